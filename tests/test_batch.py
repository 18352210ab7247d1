"""Tables of prompts to pictures and a manifest: against `generate`, by other readers of the files, after kills."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import webdataset
from PIL import Image

import oracle
from extensions import batch, batch_artist, batch_table
from images import open_image, read_parameters
from pipeline import generate

ROOT = Path(__file__).parent.parent
FAST = {"n_inference_steps": 2, "sampler_name": "ddim"}
PROMPTS = [{"prompt": f"cat {k}", "seed": k, **FAST} for k in range(5)]


@pytest.fixture
def here(monkeypatch):
    """Units of work drawn in this process, one after another. Returns the list of prompts that were drawn."""
    drawn, draw = [], batch_artist.Artist.draw

    def note(artist, jobs):
        drawn.extend(job["arguments"]["prompt"] for job in jobs)
        return draw(artist, jobs)

    monkeypatch.setattr(batch_artist.Artist, "draw", note)
    draw_in_this_process(monkeypatch)
    return drawn


def draw_in_this_process(monkeypatch):
    def hand_out(units, settings):
        artist = batch_artist.Artist(settings)
        for unit in units:
            yield from artist.draw_unit(json.loads(json.dumps(unit)))

    monkeypatch.setattr(batch, "start_ray", lambda *arguments: None)
    monkeypatch.setattr(batch, "choose_devices", lambda *arguments: {"workers": 1, "device": "cpu"})
    monkeypatch.setattr(batch, "hand_out", hand_out)


@pytest.fixture
def run(here, checkpoint, tmp_path):
    """run(rows, …) writes rows as JSON lines and runs the command. Returns its status and the manifest's rows."""
    def run(rows, *options, output=tmp_path / "out"):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = batch.main([str(path), str(output), "--checkpoint", str(checkpoint), *options])
        manifest = Path(output) / "manifest.parquet"
        return status, pq.read_table(manifest).to_pylist() if manifest.exists() else None
    return run


def picture(output, row):
    """A row's picture, its hash checked on the way."""
    content = (output / row["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == row["sha256"]
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


# ---- what is drawn


def test_pictures_are_those_of_generate(run, models, tokenizer, tmp_path):
    """In batches of three with other rows, and from pictures of two sizes: within a grey level of each row alone."""
    rng = np.random.default_rng(0)
    for name, size in [("a", (48, 64)), ("b", (48, 64)), ("c", (64, 40))]:
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    settings = [{"sampler_name": "ddpm"}, {"sampler_name": "euler_a", "cfg_scale": 3}, {"do_cfg": False},
                {"uncond_prompt": "dog"}, {"height": 32, "width": 48}, {"sampler_name": "dpmpp_2m_sde"},
                {"input_image": str(tmp_path / "a.png"), "strength": 0.6},
                {"input_image": str(tmp_path / "b.png"), "strength": 0.6},
                {"input_image": str(tmp_path / "c.png"), "strength": 0.6},
                {"input_image": str(tmp_path / "c.png"), "width": 32}]
    rows = [{"prompt": f"cat {k % 4}", "seed": 10 + k % 3, **FAST, "n_inference_steps": 3, **more}
            for k, more in enumerate(2 * settings)]
    status, manifest = run(rows, "--batch", "3", "--dtype", "float32")
    assert status == 0 and len(manifest) == len(rows)
    for row, told in zip(rows, manifest):
        alone = generate(models=models, tokenizer=tokenizer, progress=False, **row)
        assert abs(picture(tmp_path / "out", told) - alone).max() <= 1, row


def test_a_picture_does_not_depend_on_its_company(run, tmp_path):
    """Alone, or at whichever place among others, it is the same file, byte for byte."""
    _, alone = run(PROMPTS[2:3], "--batch", "4", output=tmp_path / "alone")
    _, among = run(PROMPTS[::-1], "--batch", "4", output=tmp_path / "among")
    assert [row["file"] for row in among if row["sha256"] == alone[0]["sha256"]] == [alone[0]["file"]]
    assert alone[0]["prompt"] == "cat 2" and len({row["sha256"] for row in among}) == 5


def test_a_picture_carries_its_settings(run, tmp_path):
    _, manifest = run([{"prompt": "a cat", "uncond_prompt": "a dog", "cfg_scale": 3, **FAST}])
    told = read_parameters(tmp_path / "out" / manifest[0]["file"])
    assert (told["prompt"], told["uncond_prompt"], told["cfg_scale"]) == ("a cat", "a dog", 3.0)
    assert (told["seed"], told["n_inference_steps"], told["sampler_name"]) == (manifest[0]["seed"], 2, "ddim")


def test_rows_without_a_seed_get_one_by_their_content(run, here, tmp_path):
    rows = [{"prompt": "cat", "note": "a", **FAST}, {"prompt": "dog", **FAST}, {"prompt": "cat", "note": "b", **FAST}]
    status, manifest = run(rows)
    assert status == 0 and here == ["cat", "dog"]  # a repeated row is drawn once and named twice
    assert manifest[0]["seed"] == manifest[2]["seed"] != manifest[1]["seed"]
    assert manifest[0]["file"] == manifest[2]["file"] and manifest[0]["note"] == "a" and manifest[2]["note"] == "b"
    _, again = run([{"cfg_scale": None, **row} for row in reversed(rows)], output=tmp_path / "again")
    assert [row["sha256"] for row in again] == [row["sha256"] for row in reversed(manifest)]


# ---- tables


def test_tables_say_the_same_in_each_format(tmp_path):
    """As pandas, pyarrow and json write them; a column of whole numbers with gaps becomes floats in pandas."""
    rows = [{"prompt": 'a "cat", sitting\nstill', "seed": 2**40 + 1, "height": 64, **FAST, "id": "007"},
            {"prompt": "猫", "seed": 3, "height": None, **FAST, "id": "x"}]
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "table.csv", index=False)
    frame.to_csv(tmp_path / "bom.csv", index=False, encoding="utf-8-sig")
    frame.to_csv(tmp_path / "packed.csv.gz", index=False)
    frame.to_parquet(tmp_path / "pandas.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "arrow.parquet")
    frame.to_json(tmp_path / "table.jsonl", orient="records", lines=True)
    for path in list(tmp_path.iterdir()):
        table, faults, _ = batch_table.read_table(str(path))
        assert table.to_pylist() == rows and not faults, path
        keys, seeds, errors, jobs = batch_table.plan_rows(table, faults, {})
        assert seeds == [2**40 + 1, 3] and list(jobs) == keys and not errors
        assert jobs[keys[0]]["arguments"]["height"] == 64 and jobs[keys[1]]["arguments"]["height"] is None


BAD = [({"prompt": None}, "no prompt"), ({"prompt": 5}, "give a text"), ({"height": 65}, "multiple of 8"),
       ({"height": "tall"}, "multiple of 8"), ({"width": -8}, "multiple of 8"), ({"seed": -1}, "seed is -1"),
       ({"seed": True}, "seed is 'true'"), ({"seed": 10**30}, "seed is 1"), ({"n_inference_steps": 0}, "1 to 1000"),
       ({"n_inference_steps": 2.5}, "1 to 1000"), ({"sampler_name": "nope"}, "known are"), ({"do_cfg": 3}, "do_cfg"),
       ({"cfg_scale": "much"}, "cfg_scale is 'much'"), ({"cfg_scale": float("nan")}, "finite"),
       ({"prompt": ["cat", "dog"]}, "give a text"), ({"height": [64]}, "give one value"),
       ({"input_image": "nowhere.png"}, "no such file"), ({"strength": 0}, "(0, 1]"), ({"prompt": "\ud800"}, "letter")]


def test_a_bad_row_becomes_a_reason(run, here, tmp_path):
    """Each with all other rows drawn; what was given stands in the manifest."""
    rows = [PROMPTS[0], *({"prompt": "bad", **FAST, **bad} for bad, _ in BAD), PROMPTS[1]]
    status, manifest = run(rows)
    assert status == 1 and here == ["cat 0", "cat 1"] and len(manifest) == len(rows)
    assert manifest[0]["error"] is None and manifest[-1]["error"] is None
    for (_, reason), row in zip(BAD, manifest[1:-1]):
        assert reason in row["error"] and row["file"] is row["sha256"] is row["seconds"] is None
    assert manifest[4]["height"] == "tall"


def test_a_line_that_cannot_be_read_becomes_a_reason(here, checkpoint, tmp_path):
    lines = {"csv": "prompt,n_inference_steps\ncat,1\ncat,1,2\n\ndog,1\n",
             "jsonl": '{"prompt": "cat", "n_inference_steps": 1}\n{"prompt": \n\n{"prompt": "dog"}'}
    for kind, text in lines.items():
        (tmp_path / f"table.{kind}").write_text(text)
        assert batch.main([str(tmp_path / f"table.{kind}"), str(tmp_path / kind), "--checkpoint", str(checkpoint)]) == 1
        manifest = pq.read_table(tmp_path / kind / "manifest.parquet").to_pylist()
        assert [bool(row["error"]) for row in manifest] == [False, True, False], kind


NOTHING_BEGINS = [({"promt": "cat"}, "rename 'promt'"), ({"prompt": "cat", "n_inference_step": 2}, "n_inference_steps"),
                  ({"prompt": "cat", "Seed": 2}, "'seed'"), ({"prompt": "cat", "steps": 2}, "n_inference_steps"),
                  ({"prompt": "cat", "negative_prompt": "dog"}, "uncond_prompt"),
                  ({"prompt": "cat", "device": "cpu"}, "cannot give"), ({"prompt": "cat", "file": "a"}, "manifest")]


@pytest.mark.parametrize("row, reason", NOTHING_BEGINS)
def test_a_column_that_cannot_be_meant_stops_all(run, here, tmp_path, capsys, row, reason):
    assert run([row]) == (2, None) and not here and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize("name, content, reason", [
    ("none.csv", None, "no such file"), ("a.txt", "prompt\ncat", "give a .csv"), ("a.csv", "", "no rows"),
    ("a.csv", "prompt\n", "no rows"), ("a.csv", 'prompt\n"cat', "not a whole csv"),
    ("a.csv", "prompt,prompt\na,b", "twice"),
    ("a.parquet", "PAR1", "not a whole parquet"), ("a.csv", b"prompt\n\xff", "not a whole csv")])
def test_a_table_that_cannot_be_read_stops_all(here, tmp_path, capsys, checkpoint, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert batch.main([str(tmp_path / name), str(tmp_path / "out"), "--checkpoint", str(checkpoint)]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_model_or_folder_that_cannot_be_used_stops_all(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(PROMPTS, "--checkpoint", str(tmp_path / "none.safetensors"))[0] == 2
    assert run(PROMPTS, "--checkpoint", str(tmp_path / "file"))[0] == 2
    assert batch.main([str(tmp_path / "prompts.jsonl"), str(tmp_path / "file")]) == 2
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(SystemExit, match="2"):
        run(PROMPTS, "--shard-size", "5")  # which is nothing without --format webdataset


def test_dry_run_checks_all_and_draws_nothing(run, here, tmp_path, capsys):
    assert run([*PROMPTS, {"prompt": "bad", "height": 3}], "--dry-run") == (1, None)
    assert not (tmp_path / "out").exists()
    told = capsys.readouterr().out
    assert "row 6: height is 3" in told and "5 to draw" in told and "5 batches of 1" in told
    assert run(PROMPTS, "--dry-run")[0] == 0


# ---- again, and after a kill


def test_what_is_there_is_not_drawn_again(run, here, checkpoint, tmp_path):
    _, first = run(PROMPTS[:3])
    assert run(PROMPTS[:3]) == (0, first)
    _, more = run(PROMPTS)
    assert here == [f"cat {k}" for k in range(5)] and more[:3] == first
    (tmp_path / "out" / first[1]["file"]).unlink()  # gone, and cut off
    (tmp_path / "out" / first[2]["file"]).write_bytes(b"PNG")
    _, again = run(PROMPTS)
    assert here[5:] == ["cat 1", "cat 2"]
    assert [row["sha256"] for row in again] == [row["sha256"] for row in more]


def test_what_is_there_from_another_model_or_picture_is_drawn_anew(run, here, tmp_path):
    other = tmp_path / "other.safetensors"
    oracle.write_checkpoint(other, seed=5)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")
    rows = [{"prompt": "cat", "input_image": str(tmp_path / "image.png"), "seed": 1, **FAST}]
    files = {run(rows, *options)[1][0]["file"] for options in [(), ("--dtype", "bfloat16"),
                                                               ("--checkpoint", str(other))]}
    batch_table.look_at.cache_clear()
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "image.png")
    files.add(run(rows)[1][0]["file"])
    assert len(files) == len(here) == 4


def test_the_manifest_of_other_prompts_is_kept(run, tmp_path):
    _, first = run(PROMPTS[:2])
    run(PROMPTS[2:])
    run(PROMPTS[2:])
    kept, = (tmp_path / "out").glob("manifest-*.parquet")
    assert pq.read_table(kept).to_pylist() == first


class Killed(BaseException):
    pass


def draw_noise_alone(drawn):
    """Artist.draw without networks, as what it draws is not what matters."""
    def draw(artist, jobs):
        drawn.extend(job["arguments"]["prompt"] for job in jobs)
        return [np.random.default_rng(job["arguments"]["seed"]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                for job in jobs]
    return draw


@pytest.mark.parametrize("options", [(), ("--format", "webdataset", "--shard-size", "3")])
def test_a_kill_at_any_moment_loses_nothing(run, here, monkeypatch, tmp_path, options):
    """At the n-th file to be written, before it has its name, for every n: run after run, until one comes through."""
    rows = [*PROMPTS, {"prompt": "bad", "height": 3}]
    replace, written = os.replace, []
    monkeypatch.setattr(batch_artist.Artist, "draw", draw_noise_alone(here))
    _, undisturbed = run(rows, "--batch", "2", *options, output=tmp_path / "undisturbed")

    def killed(source, target):
        written.append(target)
        if len(written) == n:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for n in range(1, 100):
        output, done = tmp_path / str(n), set()
        written.clear()
        here.clear()
        try:
            run(rows, "--batch", "2", *options, output=output)
            break
        except Killed:
            done = {path.name for path in output.rglob("*.png")} | {path.name for path in output.rglob("*.tar")}
        n_before = len(here)
        status, manifest = run(rows, "--batch", "2", *options, output=output)
        names = ("prompt", "seed", "file", "sha256", "error")
        assert status == 1 and [[row[name] for name in names] for row in manifest] == \
            [[row[name] for name in names] for row in undisturbed]
        there = {row["prompt"] for row in manifest if row["file"] and Path(row["file"]).name in done}
        assert not there & set(here[n_before:])  # nothing that was there is drawn twice
        assert all(row["seconds"] > 0 for row in manifest if row["file"])
    assert n > 4


def test_unfinished_files_are_removed_once_they_are_old(run, tmp_path):
    run(PROMPTS[:1])
    old, young = (tmp_path / "out" / "pictures" / f"x.png.{age}.tmp" for age in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    run(PROMPTS[:1])
    assert young.exists() and not old.exists()


def test_a_row_that_fails_takes_no_other_along(run, monkeypatch):
    def fail(prompts, *arguments, **settings):
        if "cat 1" in prompts:
            raise FloatingPointError("the latents hold NaN\nor infinity")
        return generate(prompts, *arguments, **settings)

    monkeypatch.setattr(batch_artist, "generate", fail)
    status, manifest = run(PROMPTS, "--batch", "4")
    assert status == 1
    assert [row["error"] for row in manifest] == [None, "the latents hold NaN or infinity", None, None, None]
    monkeypatch.undo()


# ---- shards and places


def test_shards_are_webdatasets(run, here, tmp_path):
    """Read by webdataset's own reader; the same bytes in every run."""
    status, manifest = run(PROMPTS, "--format", "webdataset", "--shard-size", "3", "--batch", "2")
    shards = sorted({row["file"] for row in manifest})
    assert status == 0 and len(shards) == 2
    samples = {sample["__key__"]: sample for sample in
               webdataset.WebDataset([str(tmp_path / "out" / shard) for shard in shards], shardshuffle=False)}
    assert set(samples) == {row["sha256"] for row in manifest}
    for row in manifest:
        sample = samples[row["sha256"]]
        assert hashlib.sha256(sample["png"]).hexdigest() == row["sha256"]
        assert json.loads(sample["json"])["prompt"] == row["prompt"]
        assert open_image(io.BytesIO(sample["png"])).size == (64, 64)
    run(PROMPTS, "--format", "webdataset", "--shard-size", "3", "--batch", "2", output=tmp_path / "again")
    for shard in shards:
        assert (tmp_path / "again" / shard).read_bytes() == (tmp_path / "out" / shard).read_bytes()
    run(PROMPTS)  # as files of their own: asked for, so not taken as there
    assert len(here) == 15


def test_paths_are_fsspecs(here, checkpoint):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/in/table.csv", b"prompt,n_inference_steps,seed\ncat,1,1\ncat,1,1\ndog,1,2\n")
    for _ in range(2):
        arguments = ["memory://in/table.csv", "memory://out/a", "--checkpoint", str(checkpoint)]
        assert batch.main(arguments) == 0
    manifest = pq.read_table(pa.BufferReader(fs.cat_file("/out/a/manifest.parquet"))).to_pylist()
    assert here == ["cat", "dog"] and manifest[0]["file"] == manifest[1]["file"]
    assert hashlib.sha256(fs.cat_file(f"/out/a/{manifest[2]['file']}")).hexdigest() == manifest[2]["sha256"]


def test_it_says_how_to_install_what_is_missing(tmp_path):
    """And can be imported without."""
    code = """if True:
        import sys
        sys.modules |= dict.fromkeys(["ray", "pyarrow", "fsspec", "webdataset"])
        from extensions import batch
        sys.exit(batch.main(["a.csv", "out"]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install -r extensions/requirements-batch.txt" in done.stderr
    assert (ROOT / "extensions" / "requirements-batch.txt").exists()


# ---- Ray


class Mortal(batch_artist.Artist):
    """An Artist whose process is killed at one prompt once, and at another one always."""

    def draw(self, jobs):
        prompts = [job["arguments"]["prompt"] for job in jobs]
        once = Path(self.root) / "killed"
        if "poison" in prompts or "cat 3" in prompts and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(jobs)


def test_workers_that_are_killed(checkpoint, tmp_path, monkeypatch):
    """Ray on this machine: the pictures of a killed worker are drawn by the next, to the byte as in one process; a row
    that kills each of them becomes a reason."""
    rows = [*PROMPTS, {"prompt": "poison", "seed": 1, **FAST}]
    table = tmp_path / "prompts.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--checkpoint", str(checkpoint), "--batch", "2"]
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's 15 leaves them no time beside other tests
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find tests
    monkeypatch.setattr(batch, "Artist", Mortal)
    monkeypatch.setattr(batch, "SPARE_RETRIES", 1)
    try:
        assert batch.main([str(table), str(tmp_path / "out"), "--workers", "2", *options]) == 1
    finally:
        ray.shutdown()
    manifest = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    errors = {row["prompt"]: row["error"] for row in manifest if row["error"]}
    assert (tmp_path / "out" / "killed").exists()
    assert set(errors) <= {"poison", "cat 4"} and "died" in errors["poison"]  # cat 4: was to be drawn with it

    table.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    draw_in_this_process(monkeypatch)
    assert batch.main([str(table), str(tmp_path / "here"), *options]) == 0
    hashes = [row["sha256"] for row in pq.read_table(tmp_path / "here" / "manifest.parquet").to_pylist()]
    assert [row["sha256"] for row in manifest[:4]] == hashes[:4]
