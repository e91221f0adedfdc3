"""URLs that hold keys: their data are read, and the key ends in no file and on no screen."""

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
from commands import environment, small
from servers import FileServer
from warm import warm_run, without_pictures

from mde_dist import export
from mde_dist.data.config import CacheOptions
from mde_dist.data.storage.remote import open_remote
from mde_dist.data.store import open_store
from mde_dist.models.weights import read_model, serialize_model
from mde_dist.reporting.history import read_run
from mde_dist.training.config import Config, DataConfig, as_json, dump_toml, read_config, to_toml
from mde_dist.utils.errors import UserError
from mde_dist.utils.urls import SIGNED_URLS, hide_key, public_url, whole_url, without_keys

FIRST, SECOND = "X-Amz-Expires=60&X-Amz-Signature=5ea1edF1rst%2B", "sv=2024-01-01&sig=5ea1edSec0nd%3D"
PART = b"5ea1ed"
"""Of both keys."""


@pytest.fixture(autouse=True)
def no_urls(monkeypatch):
    monkeypatch.setenv(SIGNED_URLS, "")


@pytest.mark.parametrize(
    ("location", "public"),
    [
        ("https://host/a/b?sig=key", "https://host/a/b"),
        ("https://host/a?x=1?y=@2#z", "https://host/a"),
        ("https://host?sig=key", "https://host"),
        ("https://host/a#key", "https://host/a"),
        ("https://me:key@host:81/a@b/c", "https://host:81/a@b/c"),
        ("https://key@host/a", "https://host/a"),
        ("https://me:k/e?y@host/a", "https://host/a"),  # which should have been quoted
        ("s3://me:key@bucket/a", "s3://bucket/a"),
        ("http://[::1]:81/a@b", "http://[::1]:81/a@b"),
        ("http://host:81/a@b/%3F", "http://host:81/a@b/%3F"),
        ("/data/a?b@c#d", "/data/a?b@c#d"),
    ],
)
def test_the_public_form_names_the_place_without_the_key(location, public):
    assert public_url(location) == public == public_url(public)
    assert without_keys(f"before '{location}' after") == f"before '{public}' after"
    assert hide_key(location) == public
    assert whole_url(public) == whole_url(location) == location
    if public != location:
        assert whole_url(f"{public}/") == location and whole_url(f"{public}/other") == f"{public}/other"


def test_the_key_that_was_given_last_counts_and_children_have_it():
    for key in (FIRST, SECOND):
        hide_key(f"https://host/my set/?{key}")
    hide_key(f"https://host/other?{FIRST}")
    line = "from mde_dist.utils.urls import whole_url; print(whole_url('https://host/my set'), whole_url('https://host/other/'))"
    said = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True).stdout
    assert said.split() == [f"https://host/my%20set/?{SECOND}", f"https://host/other?{FIRST}"]
    assert len(os.environ[SIGNED_URLS].split()) == 2


def test_a_config_holds_no_key_whichever_way_it_was_given(tmp_path):
    url = f"https://host/a?{FIRST}"
    (tmp_path / "a.toml").write_text(f'[data]\nshards = "{url}"\n')
    by_file = read_config(["--config", str(tmp_path / "a.toml"), "--train.seed", "3", "--data.eval-shards", url])
    for config in (by_file, Config(data=DataConfig(shards=url, eval_shards=url))):
        assert config.data.shards == config.data.eval_shards == "https://host/a"
        assert PART.decode() not in repr(config) + to_toml(config) + str(as_json(config))
    with pytest.raises(UserError) as error:
        read_config(["--data.shrads", url])
    assert PART.decode() not in str(error.value) and "https://host/a" in str(error.value)


def test_what_older_versions_wrote_down_is_not_handed_on(tmp_path):
    url, metadata = f"https://host/a?{FIRST}", {"size": [32, 32]}
    (tmp_path / "old.safetensors").write_bytes(serialize_model({}, {"config": {"data.shards": url}, **metadata}))
    assert read_model(tmp_path / "old.safetensors")[0]["config"] == {"data.shards": "https://host/a"}
    (tmp_path / "config.toml").write_text(dump_toml([("data.shards", url)]))
    (tmp_path / "metrics.jsonl").touch()
    run = read_run(tmp_path, "run")
    assert run.config == {"data.shards": "https://host/a"} and PART.decode() not in run.toml


@pytest.mark.parametrize("given", [f"?{FIRST}", f"?{SECOND}", ""])
def test_a_key_that_does_not_open_the_door_is_said_and_not_shown(given, room_shards, tmp_path):
    with FileServer(room_shards) as server:
        server.key = "another"
        with pytest.raises(UserError, match="signed URL") as error:
            open_store(server.url + given, CacheOptions(tmp_path))
    assert PART.decode() not in str(error.value)
    with pytest.raises(UserError, match="takes no query"):
        open_remote(f"s3://bucket/a?{FIRST}")


@pytest.mark.slow
def test_nothing_of_a_run_from_a_signed_url_holds_its_key(room_shards, tmp_path, monkeypatch, capfd):
    run, said = tmp_path / "run", []

    def command(name: str, code: int = 0, **options: Any) -> str:
        done = warm_run(name, run=run, **options)
        assert done.returncode == code, done.stdout + done.stderr
        said.append(done.stdout + done.stderr)
        return said[-1]

    quick = partial(command, before=without_pictures)

    given = small(train_total_samples=24, train_log_every=24, data_cache=tmp_path / "cache")
    with FileServer(room_shards.parent) as server:
        place = f"{server.url}/{room_shards.name}"
        server.key = FIRST
        first = command("train", **given, **{"data.shards": f"{place}/?{FIRST}"})
        assert "note:" not in first and place in first  # the report's best and worst images came from the server, too

        # the key has expired: what is noted down does without, and a new one opens the same run
        server.key = SECOND
        assert "signed URL" in quick("train", 2, config=run / "config.toml")
        quick("train", config=run / "config.toml", **{"data.shards": f"{place}?{SECOND}"})
        command("evaluate", env=environment(**{SIGNED_URLS: f"{place}?{SECOND}"}), json=tmp_path / "scores.json")
        monkeypatch.setenv(SIGNED_URLS, f"{place}?{SECOND}")
        out = tmp_path / "out"
        export.main(["--run", str(run), "--output", str(out), "--formats", "torch", "--size", "32x32"])
        said.append("".join(capfd.readouterr()))
    assert place in (out / "README.md").read_text() + (run / "config.toml").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"run", "out", "cache", "logs", "evaluations"}
    assert [path for path in files if PART in path.read_bytes() or PART.decode() in path.name] == []
    assert PART.decode() not in "".join(said)
