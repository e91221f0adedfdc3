"use strict";
// What the page does beyond showing: pictures over training, sorting and filtering, values under the pointer.
(() => {
  for (const part of document.querySelectorAll(".with-script, .controls")) part.hidden = false;
  for (const part of document.querySelectorAll(".no-script")) part.remove();
  const dataOf = (part) => JSON.parse(part.querySelector('script[type="application/json"]').textContent);

  // --- the slider ---
  for (const film of document.querySelectorAll(".film")) {
    const slider = film.querySelector("input[type=range]");
    if (!slider) continue;
    const data = dataOf(film), now = film.querySelector(".controls .now"), play = film.querySelector(".play");
    const tiles = film.querySelectorAll(".tile[data-part]");
    const show = () => {
      const time = Number(slider.value);
      for (const tile of tiles) {
        const run = data.runs[tile.dataset.run], moment = run.moments[run.at[time]];
        const [source, text, caption] = moment[tile.dataset.part][tile.dataset.image];
        const picture = tile.querySelector("img");
        if (picture.getAttribute("src") !== source) picture.src = source;
        picture.alt = text;
        tile.querySelector("figcaption").textContent = caption;
      }
      now.textContent = data.words[time].replaceAll("; ", "\n");
      slider.setAttribute("aria-valuetext", data.words[time]);
    };
    let timer = 0;
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      play.textContent = "▶";
      play.setAttribute("aria-label", "Play");
    };
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (slider.value === slider.max) slider.value = 0;
      show();
      play.textContent = "❚❚";
      play.setAttribute("aria-label", "Pause");
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        show();
        if (slider.value === slider.max) stop();
      }, 700);
    });
    slider.addEventListener("input", () => { stop(); show(); });
    show(); // a browser may have kept another place of the slider
  }

  // --- sorting and filtering ---
  const inOrder = new Intl.Collator("en", { numeric: true }).compare;
  const valueOf = (text) => Number(text.replace("\u2212", "-"));
  for (const table of document.querySelectorAll(".sortable")) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const numbers = head.classList.contains("number");
        const rows = [...body.rows].map((row) => {
          const text = row.cells[column].textContent;
          return { row, key: numbers ? valueOf(text) : text };
        });
        rows.sort((a, b) => {
          if (!numbers) return sign * inOrder(a.key, b.key);
          if (Number.isNaN(a.key) || Number.isNaN(b.key)) return Number.isNaN(a.key) - Number.isNaN(b.key);
          return sign * (a.key - b.key);
        });
        body.append(...rows.map(({ row }) => row));
      });
    });
  }
  for (const box of document.querySelectorAll(".images")) {
    const field = box.querySelector("input"), count = box.querySelector(".count"), rows = [...box.querySelectorAll("tbody tr")];
    const texts = rows.map((row) => [...row.cells].filter((c) => !c.classList.contains("number")).map((c) => c.textContent).join(" ").toLowerCase());
    const apply = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, place) => {
        row.hidden = !words.every((word) => texts[place].includes(word));
        shown += !row.hidden;
      });
      count.textContent = words.length ? `${shown} of ${rows.length} images` : `${rows.length} images`;
    };
    field.addEventListener("input", apply);
    apply();
  }

  // --- the values of a chart ---
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  const ns = "http://www.w3.org/2000/svg";
  const marks = document.createElementNS(ns, "g");
  const draw = (name, attributes) => {
    const shape = document.createElementNS(ns, name);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    marks.append(shape);
  };
  const seconds = (value) => {
    for (const [size, name] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (value >= size) return `${(value / size).toFixed(1)} ${name}`;
    return `${Math.round(value)} s`;
  };
  const hide = () => { tip.remove(); marks.remove(); };
  for (const plot of document.querySelectorAll(".plot")) {
    if (!plot.querySelector("script")) continue;
    const svg = plot.querySelector("svg"), data = dataOf(plot), box = svg.viewBox.baseVal;
    const [left, right, top, bottom] = data.frame;
    const curves = data.curves.map((curve) => ({ ...curve, points: curve.points.filter(Boolean) }));
    const places = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
    if (!places.length) continue;
    const across = (x) => left + (x / data.end) * (right - left);
    const nearest = (points, x, of) => points.reduce((best, point) => (Math.abs(of(point) - x) < Math.abs(of(best) - x) ? point : best));
    const reach = data.end / 40;
    let at = places.length - 1;
    const show = (x) => {
      marks.replaceChildren();
      draw("path", { class: "cross", d: `M${across(x).toFixed(1)} ${top}V${bottom}` });
      const lines = [data.over === "samples" ? `after ${Math.round(x).toLocaleString("en")} samples` : `${seconds(x)} in training`];
      for (const curve of curves) {
        if (!curve.points.length) continue;
        const point = nearest(curve.points, x, (p) => p[0]);
        if (curves.length > 1 && Math.abs(point[0] - x) > reach) continue;
        const value = data.percent ? `${(100 * point[1]).toPrecision(3)}%` : String(Number(point[1].toPrecision(4)));
        lines.push(curves.length > 1 ? `${curve.name}: ${value}` : `${data.title} ${value}`);
        draw("circle", { class: `here r${curve.run}`, cx: across(point[0]).toFixed(1), cy: point[2], r: 4 });
      }
      svg.append(marks);
      tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line })));
      plot.append(tip);
      const wide = plot.clientWidth, middle = (across(x) / box.width) * wide;
      const beside = middle > wide / 2 ? middle - tip.offsetWidth - 10 : middle + 10;
      tip.style.left = `${Math.max(0, Math.min(beside, wide - tip.offsetWidth))}px`;
    };
    const point = (event) => {
      const frame = svg.getBoundingClientRect();
      const x = (((event.clientX - frame.left) / frame.width) * box.width - left) / (right - left) * data.end;
      at = places.indexOf(nearest(places, x, (p) => p));
      show(places[at]);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", hide);
    svg.tabIndex = 0;
    svg.setAttribute("aria-description", "Arrow keys tell the values along it.");
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, Home: -places.length, End: places.length }[event.key];
      if (event.key === "Escape") return hide();
      if (!step) return;
      event.preventDefault();
      at = Math.max(0, Math.min(places.length - 1, at + step));
      show(places[at]);
    });
  }
})();
