"""Frames of videos: the right ones, upright, and what is wrong with damaged videos."""

import struct
import sys

import numpy as np
import pytest
from PIL import Image

from mde_dist import predict
from mde_dist.inference.video import VideoFrame, count_frames, import_av, read_video
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_pretrained_model
from mde_dist.models.weights import serialize_model
from mde_dist.packing.rooms import render_room
from mde_dist.utils.errors import UserError

av = pytest.importorskip("av")


def write_video(path, frames, codec="ffv1", pixels="bgr0", **options):
    """Frames, RGB uint8 (height, width, 3), at ten a second."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def rooms():
    return [render_room(seed, (48, 64))[0] for seed in range(7)]


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    metadata = {"config": {"model.encoder": "resnet18"}, "size": [48, 64]}
    path.write_bytes(serialize_model(create_pretrained_model(ModelConfig(), seed=3).state_dict(), metadata))
    return path


def read(path, every=1):
    """-> (numbers of the frames, what is said)."""
    found = list(read_video(path, every))
    frames = [one for one in found if isinstance(one, VideoFrame)]
    return [frame.number for frame in frames], [one for one in found if isinstance(one, str)]


def test_frames_are_predicted_as_the_same_images_are(rooms, checkpoint, tmp_path):
    video = write_video(tmp_path / "walk.mkv", rooms)  # without loss
    for number, room in enumerate(rooms):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(room).save(tmp_path / "images" / f"{number:06d}.png")
    out = tmp_path / "out"
    options = ["--checkpoint", str(checkpoint), "--output", str(out), "--npy", "--batch-size", "3"]
    predict.main([str(video), str(tmp_path / "images"), *options])
    assert len(list((out / "walk").glob("*_depth.npy"))) == 7
    for path in (out / "walk").iterdir():
        other = out / path.name
        if path.suffix == ".npy":
            np.testing.assert_allclose(np.load(path), np.load(other), rtol=1e-5)
        else:
            stored = [np.asarray(Image.open(one)).astype(int) for one in (path, other)]
            assert np.abs(stored[0] - stored[1]).max() <= (1 if path.name.endswith("_depth.png") else 2)


def test_one_of_every_few_frames_keeps_its_number(rooms, checkpoint, tmp_path):
    video = write_video(tmp_path / "walk.mkv", rooms)
    arguments = [str(video), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    predict.main([*arguments, "--every", "3"])
    made = sorted(path.name for path in (tmp_path / "out/walk").glob("*_depth.png"))
    assert made == ["000000_depth.png", "000003_depth.png", "000006_depth.png"]
    assert count_frames(video, 3) == 3


def test_a_video_is_turned_as_the_camera_was_held(rooms, tmp_path):
    """A telephone held upright stores its frames lying, and in the head of the track how to turn them."""
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :16] = 255  # what the telephone's left is, is on top once it is turned clockwise
    path = write_video(tmp_path / "a.mp4", [frame] * 3, "mpeg4", "yuv420p")
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    assert data[start : start + 4] == struct.pack(">i", 1 << 16)  # the matrix, of a video that is upright
    one = 1 << 16
    data[start : start + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    path.write_bytes(data)
    found = [one for one in read_video(path, 1) if isinstance(one, VideoFrame)]
    assert [frame.image.shape for frame in found] == [(64, 48, 3)] * 3
    assert found[0].image[:12].min() > 200
    assert found[0].image[20:].max() < 50


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "is not a readable video ("), (b"no video" * 100, "is not a readable video ("), (None, "has no frames")],
    ids=["empty", "text", "sound"],
)
def test_what_is_no_video_is_one_line(checkpoint, tmp_path, capsys, data, words):
    path = tmp_path / "a.mp4"
    if data is None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    else:
        path.write_bytes(data)
    numbers, said = read(path)
    assert not numbers
    assert len(said) == 1
    assert said[0].startswith(f"{path} {words}")
    with pytest.raises(UserError, match="1 of 1 images could not be read"):
        predict.main([str(path), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")])
    assert f"skipped {said[0]}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_video_that_was_cut_off_gives_the_frames_it_has(rooms, tmp_path, name):
    options = {"codec": "ffv1"} if name == "a.mkv" else {"codec": "mpeg4", "pixels": "yuv420p", "movflags": "faststart"}
    path = write_video(tmp_path / name, rooms, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    numbers, said = read(path)
    assert numbers == list(range(len(numbers)))
    assert 2 <= len(numbers) <= 5
    assert f"{path} ends after 0." in said[-1]
    assert "of 0.7 seconds: it is cut off" in said[-1]


@pytest.mark.parametrize(
    ("codec", "pixels", "damaged"),
    [("mjpeg", "yuvj420p", slice(100, 400)), ("mpeg4", "yuv420p", slice(110, 170))],
    ids=["it does not decode", "it decodes to nonsense"],
)
def test_a_damaged_frame_is_named_and_the_others_are_read(rooms, tmp_path, codec, pixels, damaged):
    path = write_video(tmp_path / "a.avi", rooms, codec, pixels)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(container.streams.video[0]) if packet.size]
    data = bytearray(path.read_bytes())
    start = places[3] + 8  # behind the head of the packet
    data[start + damaged.start : start + damaged.stop] = bytes(damaged.stop - damaged.start)
    path.write_bytes(data)
    assert read(path) == ([0, 1, 2, 4, 5, 6], [f"{path}, frame 3: damaged"])
    assert read(path, 2) == ([0, 2, 4, 6], [])


def test_without_pyav_a_video_is_one_line_and_images_need_none(rooms, checkpoint, tmp_path, monkeypatch):
    video = write_video(tmp_path / "walk.mkv", rooms)
    Image.fromarray(rooms[0]).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"walk\.mkv is a video, and PyAV is not installed: pip install 'mde_dist\[vi"):
        import_av(video)
    options = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"pip install 'mde_dist\[video\]'"):
        predict.main([str(tmp_path / "a.png"), str(video), *options])
    assert not (tmp_path / "out").exists()
    predict.main([str(tmp_path / "a.png"), *options])
    assert (tmp_path / "out/a_depth.png").exists()
