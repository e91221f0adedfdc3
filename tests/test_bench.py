"""The bench measures the config that it is given, its figures fit one another, and it says what limits."""

import json
import os
import shutil
import subprocess
import tarfile
import threading
from functools import partial
from pathlib import Path
from statistics import mean, median

import pytest
import torch
from commands import command, small
from warm import warm_run

from mde_dist import bench
from mde_dist.data.shards import open_split
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import DepthModel
from mde_dist.models.flops import training_flops
from mde_dist.tools.benchmarking import loader, reading, scaling, step, train
from mde_dist.tools.benchmarking.harness import (
    Column,
    Result,
    Table,
    available_cores,
    interleave,
    on_cores,
    over_rounds,
)
from mde_dist.training.config import read_config
from mde_dist.utils.errors import UserError

QUICK = {"seconds": 0.02, "rounds": 1}


def measure(word, shards, *arguments, before=None, json_file=None, **changes):
    """-> (what was printed, the JSON) of a word."""
    options = small(data_shards=shards, train_batch_size=4) | QUICK | {"json": json_file} | changes
    # or the table breaks its words where the tests were started from a narrow terminal
    done = warm_run("bench", word, *arguments, before=before, env={"COLUMNS": "160"}, **options)
    assert done.returncode == 0, done.stderr
    found = json.loads(json_file.read_text())
    assert found["bench"] == word
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["cores"] == len(available_cores())
    assert found["config"]["data.size"] == [32, 32]
    verdict = done.stdout.splitlines()[-1]
    assert verdict == f"limit: {found['limit']}" + (f"; try {found['advice']}" if found["advice"] else "")
    return done.stdout, found


def test_the_loader_is_set_against_bare_decoding_of_the_same_pairs(room_shards, tmp_path):
    text, found = measure("loader", room_shards, "--cores", "1", rounds=2, json_file=tmp_path / "loader.json")
    bare, one = found["loader"]
    assert (bare["cores"], one["cores"], one["what"]) == (1, 1, "1")
    assert len(one["rate_rounds"]) == 2
    assert one["rate"] == median(one["rate_rounds"]) > 0
    assert one["share"] == pytest.approx(one["rate"] / bare["rate"])
    assert one["per_core"] == one["rate"]
    assert one["speed_up"] == pytest.approx(1)
    sizes = []
    for path in room_shards.glob("train-*.tar"):
        with tarfile.open(path) as tar:
            sizes += [member.size for member in tar if not member.name.endswith(".json")]
    assert one["pair_kb"] == pytest.approx(2 * mean(sizes) / 1e3)  # two members a pair
    assert one["mb_per_second"] == pytest.approx(one["rate"] * one["pair_kb"] / 1e3)
    cold, warm = found["disk"]
    assert warm["rate"] > 0
    assert cold["kind"] == "cold"
    assert "30 pairs of 48x64" in text


def test_pages_that_were_not_dropped_do_not_count_as_read_from_the_disk(room_shards, monkeypatch):
    with open_split(room_shards, "train") as shards:
        for fetched, known in (([0, 10**12], True), ([0, 0], False), ([None, None], False)):
            answers = iter(fetched)
            monkeypatch.setattr(reading, "_fetched_bytes", lambda answers=answers: next(answers))
            found = reading.read_only(read_config([]), shards, threads=2)(5)
            assert (found["cold"] is not None) == known
            assert found["warm"] > 0


def test_the_decoding_threads_of_a_measurement_stay_on_its_cores(room_shards):
    before, core = os.sched_getaffinity(0), available_cores()[-1]
    with (
        open_split(room_shards, "train") as shards,
        reading.load(read_config([]), shards, torch.device("cpu"), [core]) as case,
    ):
        assert case(0.01)["rate"] > 0
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "decode-0")
        assert os.sched_getaffinity(thread.native_id) == {core}
    assert os.sched_getaffinity(0) == before
    with on_cores([core]):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


def test_damaged_shards_are_one_line(room_shards, tmp_path):
    copy = Path(shutil.copytree(room_shards, tmp_path / "shards"))
    for path in copy.glob("train-*.tar"):
        data = bytearray(path.read_bytes())
        data[700:800] = bytes(100)  # of the first member
        path.write_bytes(data)
    with open_split(copy, "train") as shards:
        for case in (
            reading.read_only(read_config([]), shards, 2),
            partial(reading.decode_only, read_config([]), shards),
        ):
            with pytest.raises(UserError, match=r"^damaged sample: .*--verify") as error:
                case(5)
            assert "\n" not in str(error.value)


def test_cases_take_turns_and_every_second_round_goes_backwards():
    order = []

    def case(name):
        return lambda seconds: order.append((name, seconds)) or len(order)

    found = interleave({"a": case("a"), "b": case("b")}, rounds=3, seconds=6)
    assert order == [("a", 2), ("b", 2), ("b", 2), ("a", 2), ("a", 2), ("b", 2)]
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}


def too_large(images):
    """A device without memory for more than so many images."""
    real = DepthModel.forward

    def forward(self, image):
        if image.device.type != "meta" and len(image) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, image)

    DepthModel.forward = forward


def test_the_step_and_its_choices_and_a_batch_that_does_not_fit(room_shards, tmp_path):
    options = ("--batches", "2", "8", "--profile", str(tmp_path / "profile"))
    before = partial(too_large, 4)
    text, found = measure("step", room_shards, *options, before=before, json_file=tmp_path / "step.json")
    rows = {row["what"]: row for row in found["step"]}
    base = rows["as it is"]
    names = ["as it is", "prepare and augment alone", "channels-last off", "batch 2", "batch 8"]
    assert list(rows) == names
    assert len(rows) == 5
    flops = training_flops(ModelConfig(encoder="tiny"), (32, 32))
    for name in ("as it is", "channels-last off", "batch 2"):
        row = rows[name]
        assert row["rate"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["tflops"] == pytest.approx(flops * row["rate"] / 1e12)
        assert row["utilisation"] is None  # of a CPU no peak is known
    assert base["gain_rounds"] == [1]
    assert rows["batch 8"]["error"] == "out of memory"
    assert rows["batch 8"]["rate"] is None
    assert "out of memory" in text
    trace = json.loads((tmp_path / "profile/step.json").read_text())
    assert any("conv" in event["name"] for event in trace["traceEvents"])
    assert "most time: " in text and "conv" in text.partition("most time: ")[2]


def test_more_ranks_are_set_against_one_and_share_the_cores_of_a_cpu(room_shards, tmp_path, monkeypatch, capsys):
    lines = []

    def warm(line):  # real ranks, without the launcher
        lines.append(line)
        ranks = int(line[line.index("--num_processes") + 1]) if "--num_processes" in line else 1
        return warm_run("bench", *line[line.index("mde_dist.bench") + 1 :], processes=ranks)

    monkeypatch.setattr(scaling, "run_to_end", warm)
    options = small(data_shards=room_shards, train_batch_size=4) | QUICK | {"json": tmp_path / "scaling.json"}
    bench.main(["scaling", "--ranks", "1", "2", *(f"--{name}={value}" for name, value in options.items())])
    one, two = json.loads((tmp_path / "scaling.json").read_text())["scaling"]
    assert [(row["ranks"], row["batch"]) for row in (one, two)] == [(1, 2), (2, 4)]
    assert two["efficiency"] == pytest.approx(two["rate"] / one["rate"] / 2)
    assert (one["efficiency"], one["all_reduce_ms"]) == (1, None)
    assert two["all_reduce_share"] > 0
    assert two["exposed"] >= 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("limit: the cores, which all ranks share on a CPU")
    assert "--num_processes" not in lines[0]
    launch = command("bench", "train", processes=2)  # of which the tests know that it starts two ranks
    assert lines[1][: len(launch)] == launch
    assert not (tmp_path / "runs").exists()

    both, steps, alone, load = two["train"]
    names = ["training", "its steps alone", "steps of each rank for itself", "its loader alone"]
    assert [row["what"] for row in two["train"]] == names
    assert [row["what"] for row in one["train"]] == [*names[:2], names[3]]
    for row in (both, steps, alone):
        assert len(row["rounds"]) == 1
        for each in row["rounds"]:
            assert len(each["ranks_rate"]) == 2
            assert each["rate"] == pytest.approx(sum(each["ranks_rate"]))
            assert 0 <= each["data_wait"] <= 1
    assert (load["ms"], load["data_wait"]) == (None, None)
    assert two["all_reduce_share"] == pytest.approx(two["all_reduce_ms"] / steps["ms"])


def test_ranks_that_fail_are_one_line(room_shards, monkeypatch):
    said = "W1125 launcher\nerror: train.batch_size = 5: no\nTraceback of the launcher"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(scaling, "run_to_end", lambda line: failed)
    with pytest.raises(UserError, match=r"^bench train, ranks 1, ended with exit code 1: train.batch_size = 5: no$"):
        bench.main(["scaling", "--ranks", "1"])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("nothing", "loader, step, train, scaling (python"),
        ("loader --seconds 0", "--seconds 0"),
        ("loader --seconds nan", "--seconds nan"),
        ("train --rounds 0", "--rounds 0"),
        ("train --json no/such/folder/x.json", "no/such/folder"),
        ("loader --cores 9999", "cores = 9999"),
        ("scaling --ranks 0", "ranks = 0"),
        ("scaling --ranks 2 --train.batch-size 3", "train.batch_size = 3"),
        ("step --batches 0", "--batches 0"),
        ("step --data.shuffle-shards 0", "data.shuffle_shards = 0"),
        ("step --no-such-option", "bench step --help"),
    ],
)
def test_a_line_that_cannot_be_measured_is_one_line(line, named):
    with pytest.raises(UserError) as error:
        bench.main(line.split())
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_ends_with_exit_code_2(tmp_path):
    done = warm_run("bench", "train", "--data.shards", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["loader", "step", "train", "scaling"])
def test_help_teaches_the_word_and_the_options_of_training(word, capsys):
    with pytest.raises(SystemExit):
        bench.main([word, "--help"])
    text = capsys.readouterr().out
    assert "--seconds" in text
    assert "--data.shards" in text
    bench.main([])
    assert f"bench {word}" in capsys.readouterr().out


# --- verdicts ---


def rates(**rows):
    """Rows of `bench train`; figures are (rate, waiting, decoders busy, cores busy, ms)."""
    keys = ("rate", "data_wait", "decoders", "cpu", "ms")
    return [dict(zip(keys, values, strict=True)) | {"what": name} for name, values in rows.items()]


@pytest.mark.parametrize(
    ("both", "steps", "load", "limit", "advice"),
    [
        ((50, 0.5, 0.2, 0.2, 9), (100, 0, 0, 0, 9), (60, 0, 0.3, 0.3, 9), "the loader, 50%", "disk"),
        (
            (50, 0.5, 0.2, 0.2, 9),
            (100, 0, 0, 0, 9),
            (60, 0, 0.99, 0.3, 9),
            "the loader, 50%",
            "more --data.threads than 2",
        ),
        ((50, 0.5, 0.2, 0.2, 9), (100, 0, 0, 0, 9), (60, 0, 0.9, 0.95, 9), "the loader, 50%", "more cores per device"),
        ((90, 0.1, 0.2, 0.2, 9), (100, 0, 0, 0, 9), (900, 0, 0.9, 0.9, 9), "unevenness", "--data.prefetch-batches 6"),
        ((99, 0.01, 0.2, 0.2, 9), (100, 0, 0, 0, 9), (900, 0, 0.9, 0.9, 9), "the step", "bench step"),
    ],
)
def test_whose_fault_it_is_that_a_gpu_waits(both, steps, load, limit, advice):
    config = read_config([])
    found = train.diagnose(config, rates(both=both, steps=steps, load=load), "cuda")
    assert limit in found[0]
    assert advice in found[1]


def test_a_host_that_is_slower_than_its_gpu_is_the_limit_whatever_little_it_waits_for_data():
    """Figures of an H200 with batches of 8; without the share of its peak, as on a CPU, nothing is said of a host."""
    rows = rates(both=(482, 0.06, 0.16, 0.1, 16.6), steps=(602, 0, 0, 0.06, 13.3), load=(3021, 0, 0.89, 0.23, 2.6))
    rows[1]["utilisation"] = 0.011
    limit, advice = train.diagnose(read_config([]), rows, "cuda")
    assert limit.startswith("the host") and "1.1% of the device's peak" in limit
    assert "--train.batch-size" in advice
    rows[1]["utilisation"] = 0.3
    assert "unevenness" in train.diagnose(read_config([]), rows, "cuda")[0]
    rows[1]["utilisation"], rows[2]["rate"], rows[0]["data_wait"] = 0.011, 500, 0.5
    assert train.diagnose(read_config([]), rows, "cuda")[0].startswith("the loader, 50%")


def test_a_network_that_costs_a_third_of_a_step_is_the_limit():
    rows = rates(both=(90, 0, 0, 0, 9), steps=(90, 0, 0, 0, 9), alone=(140, 0, 0, 0, 6), load=(900, 0, 1, 1, 9))
    limit, advice = train.diagnose(read_config([]), rows, "cuda")
    assert limit.startswith("the network, 33% of a step")
    assert "batch-size" in advice


def test_what_limits_the_loader(room_shards, monkeypatch):
    def judged(rate, cold, *options, cores=2, busy=1.0):
        limits = [{"rate": 1000, "pair_bytes": 1e5}]
        found = [[{"rate": r, "cores_busy": busy * (n + 1)}] for n, r in enumerate(rate)]
        table = loader.loader_rows(range(1, cores + 1), limits, found)
        disk = loader.disk_rows([{"cold": cold, "warm": 1}])
        return "; ".join(loader.diagnose(read_config(options), shards, table, disk))

    with open_split(room_shards, "train") as shards:
        well = judged((900, 1800), None)
        assert well.startswith("decoding, 1,800 pairs/s on 2 cores, 90% of what bare decoders give")
        assert "--data.threads 2" not in well
        assert "--data.threads 2 instead of 1" in judged((900, 1800), None, "--data.threads", "1")
        assert "mde_dist.shard --size 32x32" in judged((900, 1800), None, "--data.size", "32x32")
        assert "--data.threads 1: more only get in the way" in judged((900, 600), 5000)
        assert judged((500, 800), None).startswith(
            "the work around the decoders, which leaves 40% of their rate on 2 cores"
        )
        assert judged((500, 800), None, busy=0.5).startswith("other work on these cores: of one, the loader had 50%")
        assert "stay in memory after the first epoch" in judged((900, 1800), 100)
        monkeypatch.setattr(loader, "free_memory", lambda: 1)
        assert "the disk, 100 pairs/s" in judged((900, 1800), 100)
        assert "faster disk" in judged((900, 1800), 100)


def test_which_choices_of_the_step_are_worth_a_word():
    def row(what, options, gain, gains, batch=8):
        figures = {"rate": 100, "tflops": 1, "utilisation": 0.25, "batch": batch}
        return figures | {"what": what, "options": options, "gain": gain, "gain_rounds": gains}

    rows = [
        row("as it is", "", 1, [1, 1, 1]),
        row("a", "--train.precision bf16", 2, [1.9, 2, 2.1]),
        row("b", "--train.compile on", 1.2, [0.9, 1.2, 1.3]),  # not in every round
        row("c", "--train.channels-last off", 0.5, [0.5, 0.5, 0.5]),
        row("d", "", 1.5, [1.5, 1.5, 1.5], batch=64),
    ]
    limit, advice = step.diagnose(rows, (32, 32))
    assert "25% of the device's peak" in limit
    assert advice.split(", ")[0] == "--train.precision bf16 (2.00 times)"
    assert "compile" not in advice
    assert "channels-last" not in advice
    assert "64: 1.50 times" in advice
    limit, advice = step.diagnose([{"rate": None, "batch": 8}], (32, 32))
    assert "memory, a step of 8 images of 32x32" in limit
    assert "--train.grad-accum-steps" in advice


@pytest.mark.parametrize(
    ("most", "limit"),
    [
        ({"efficiency": 0.97}, "hardly anything"),
        ({"efficiency": 0.6, "data_wait": 0.4, "exposed": 0.1}, "the loaders, 40%"),
        ({"efficiency": 0.6, "data_wait": 0.01, "exposed": 0.3}, "summing gradients, 30%"),
    ],
)
def test_what_limits_more_gpus(most, limit):
    rows = [{"ranks": 1, "rate": 100}, {"ranks": 4, "rate": 400 * most["efficiency"], **most}]
    assert scaling.diagnose(rows, gpus=True)[0].startswith(limit)


def test_a_table_shows_what_is_not_known_as_a_dash_and_the_json_keeps_all(tmp_path, capsys):
    rows = [{"what": "a", **over_rounds("rate", [1500.0, 1700.0, 1600.0]), "share": None, "more": 1}]
    table = Table(
        "title", [Column("what", "what"), Column("rate", "rate", ",.0f"), Column("share", "share", ".0%")], rows
    )
    result = Result("step", {"rows": table}, "nothing", "")
    result.show()
    result.save(tmp_path / "x.json")
    text = capsys.readouterr().out
    assert "1,600" in text
    assert "-" in text
    assert text.splitlines()[-1] == "limit: nothing"
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["rows"] == [rows[0] | {"rate_rounds": [1500, 1700, 1600]}]
    with pytest.raises(UserError, match="cannot be written"):
        result.save(Path("/proc/none/x.json"))


def test_results_are_written_before_they_are_printed(tmp_path, monkeypatch):
    def printed(result):
        assert json.loads((tmp_path / "found.json").read_text())["limit"] == result.limit == "the test"
        raise UserError("no terminal")

    monkeypatch.setattr(loader, "measure", lambda options: Result("loader", {}, "the test", ""))
    monkeypatch.setattr(Result, "show", printed)
    with pytest.raises(UserError, match="no terminal"):
        bench.main(["loader", "--json", str(tmp_path / "found.json")])
