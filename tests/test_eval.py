"""The acceptance table. Catches: wrong anchors, labels off by one, wrong leading runs, wrong data let in."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conftest import SHARED, Ids
from dflash_cpp import DFlashError, Engine, _core
from dflash_cpp.cli import main
from dflash_cpp.commands import common
from dflash_cpp.corpus import Sample, check_writable, read_corpus, write_json_atomically
from dflash_cpp.errors import CapacityError
from dflash_cpp.evaluate import Evaluation, cross_entropy, draw_anchors, eligible_anchors, evaluate, philox

# ../shared/README.md: a PyTorch bf16 evaluation, 6 anchors a sequence drawn from 256..1007.
TABLE = {
    "mini": {"m_accept": 4.574, "k1": 0.9362, "k2": 0.8431, "k3": 0.6615, "k4": 0.4863, "val_loss": 3.069},
    "mini-weak": {"m_accept": 2.016, "k1": 0.6914, "k2": 0.4629, "k3": 0.2858, "k4": 0.1634, "val_loss": 3.604},
}


def own_text(engine: Engine, prompt: Ids, n: int = 120) -> Sample:
    g = engine.generate(prompt, max_tokens=n, ignore_eos=True)
    tokens = np.array([*prompt, *g.tokens], dtype=np.int32)
    return Sample("own", tokens, np.arange(len(tokens)) >= len(prompt))


def test_on_own_text_it_is_greedy_verification(engine: Engine, prompts: list[Ids]) -> None:
    sample = own_text(engine, prompts[0])
    result = evaluate(engine.session, engine.block_size, [sample], anchors=5)
    assert result.blocks == 5
    for p, run in zip(result.anchors, result.runs, strict=True):
        # The first token of a generation from tokens[:p] is tokens[p]; the next step verifies a whole block after it.
        stream = engine.stream(sample.tokens[:p], max_tokens=20, depth=15, lookup=False, ignore_eos=True)
        first, step = next(stream), next(stream)
        stream.close()
        assert first.tokens == (sample.tokens[p],)
        assert len(step.tokens) - 1 == run, f"anchor {p}"


def test_anchor_order_does_not_matter(engine: Engine, prompts: list[Ids]) -> None:
    sample = own_text(engine, prompts[1])
    result = evaluate(engine.session, engine.block_size, [sample], anchors=4)
    for p, hits in zip(result.anchors, result.hits, strict=True):
        engine.reset()
        logits = engine.draft_logits(sample.tokens[:p], int(sample.tokens[p]), 15, block_rows=16)
        np.testing.assert_array_equal(logits.argmax(axis=1) == sample.tokens[p + 1 : p + 16], hits)


def test_numbers_of_the_table() -> None:
    hits = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=bool)
    e = Evaluation(hits, np.full((3, 4), 2.5), np.array([0, 0, 1]), np.array([5, 9, 5]))
    assert e.runs.tolist() == [2, 0, 4]
    assert e.m_accept == pytest.approx(2.0)
    assert e.m_accept_error == pytest.approx(1.5)  # sequences of 1 and 4: their spread over the root of two
    assert e.cumulative == pytest.approx((2 / 3, 2 / 3, 1 / 3, 1 / 3))
    assert e.m_accept == pytest.approx(sum(e.cumulative))
    found = e.to_dict()
    assert found["val_loss"] == 2.5
    assert found["blocks"] == 3
    assert found["k4"] == pytest.approx(1 / 3)
    assert "k5" not in found
    json.dumps(found)


def test_cross_entropy_is_stable() -> None:
    logits = np.array([[1000.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(cross_entropy(logits, np.array([1, 2])), [1000.0, np.log(3)])


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # the known answers of Random123, where Philox comes from
        (0, [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox(key: int, counter: list[int], words: list[int]) -> None:
    assert philox(key, np.array([counter], dtype=np.uint64)).tolist() == [words]


def test_anchors_are_those_of_the_published_table() -> None:
    # What torch.randint(256, 1008, (32, 6)) gives on a CUDA device, seed 5: first rows of the first two batches.
    drawn = draw_anchors([np.arange(256, 1008)] * 40, 6, 5)
    assert drawn[0].tolist() == sorted([925, 580, 651, 474, 872, 952])
    assert drawn[1].tolist() == sorted([475, 414, 855, 1006, 391, 606])
    assert drawn[32].tolist() == sorted([384, 464, 727, 622, 475, 484])


def test_anchors_of_a_sequence_do_not_depend_on_its_neighbours() -> None:
    alone = draw_anchors([np.arange(20, 60)], 6, 1)[0]
    among = draw_anchors([np.arange(20, 60), np.arange(7, 9), np.arange(30, 40)], 6, 1)
    np.testing.assert_array_equal(among[0], alone)
    assert among[1].tolist() == [7, 8], "fewer than asked for: each once"
    assert draw_anchors([np.arange(20, 60)], 10**12, 1)[0].tolist() == list(range(20, 60))
    assert not np.array_equal(draw_anchors([np.arange(20, 60)], 6, 2)[0], alone)


def test_anchors_are_where_they_may_be() -> None:
    sample = Sample("s", np.zeros(100, np.int32))
    assert eligible_anchors(sample, slots=15, anchor_range=(20, 200)).tolist() == list(range(20, 85))
    assert eligible_anchors(sample, slots=15, anchor_range=None).tolist() == list(range(1, 85))
    mask = np.zeros(100, bool)
    mask[50:60] = True
    masked = eligible_anchors(Sample("s", sample.tokens, mask), slots=15, anchor_range=None)
    assert masked.tolist() == list(range(50, 59))


def test_short_sequences_and_wrong_numbers_are_refused(engine: Engine) -> None:
    short = [Sample("row 3", np.zeros(16, np.int32))]
    for options, message in (
        ({}, "row 3: expected room for an anchor and a block of 15 tokens"),
        ({"anchor_range": (40, 50)}, r"row 3: expected room for an anchor in 40\.\.50"),
    ):
        with pytest.raises(DFlashError, match=message):
            evaluate(engine.session, 16, short, **options)  # type: ignore[arg-type]
    with pytest.raises(DFlashError, match="none in any of 0 sequences"):
        evaluate(engine.session, 16, [])
    long = [Sample("row 4", np.zeros(5000, np.int32))]
    with pytest.raises(CapacityError, match=r"row 4.*n_ctx"):
        evaluate(engine.session, 16, long)
    fine = [Sample("row 5", np.zeros(60, np.int32))]
    for options, message in (
        ({"anchors": 0}, "anchors"),
        ({"anchor_range": (9, 3)}, "anchor range"),
        ({"block_rows": 17}, "block_rows"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ):
        with pytest.raises(DFlashError, match=message):
            evaluate(engine.session, 16, fine, **options)  # type: ignore[arg-type]


def test_sequences_without_room_are_left_out_and_counted(engine: Engine, prompts: list[Ids]) -> None:
    sample = own_text(engine, prompts[0], 40)
    short = Sample("short", sample.tokens[:16])
    masked = Sample("masked", sample.tokens, np.zeros(len(sample.tokens), bool))
    result = evaluate(engine.session, 16, [short, sample, masked], anchors=3)
    assert result.left_out == 2
    assert result.to_dict()["sequences_left_out"] == 2
    assert result.sequence.tolist() == [1, 1, 1]
    assert "left out: 2" in rendered(result)


def rendered(result: Evaluation, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(result.table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_a_narrow_terminal() -> None:
    # 80 columns are what a pipe or a log gets, and digits must not be cut off.
    n = 123456
    e = Evaluation(np.ones((n, 15), bool), np.full((n, 15), 12.345), np.arange(n) % 9, np.zeros(n, int))
    out = rendered(e)
    assert "…" not in out
    assert out.count("100.0%") == 8
    assert "123456" in out


class Recorder:
    """A session that notes how many new tokens each call takes in, or answers with broken logits."""

    def __init__(self, session: _core.Session, *, broken: bool = False) -> None:
        self.session, self.broken, self.taken, self.held = session, broken, [0], 0
        self.n_ctx = session.n_ctx

    def draft_logits(self, tokens: np.ndarray, anchor: int, n: int, rows: int) -> np.ndarray:
        self.taken.append(len(tokens) - self.held)
        self.held = len(tokens)
        logits = self.session.draft_logits(tokens, anchor, n, rows)
        return np.full_like(logits, np.nan) if self.broken else logits


def test_a_long_sequence_is_taken_in_by_pieces(make_engine: Callable[..., Engine]) -> None:
    # One call cannot be interrupted: for a large target, a long one would keep Ctrl-C waiting for minutes.
    engine = make_engine("nano", n_ctx=2048)
    tokens = np.random.default_rng(0).integers(0, 960, 1800).astype(np.int32)
    options = {"anchors": 2, "anchor_range": (1700, 1780)}
    session = Recorder(engine.session)
    result = evaluate(session, 16, [Sample("long", tokens)], **options)  # type: ignore[arg-type]
    assert max(session.taken) <= 512
    engine.reset()
    p = int(result.anchors[0])
    logits = engine.draft_logits(tokens[:p], int(tokens[p]), 15, block_rows=16)
    np.testing.assert_array_equal(cross_entropy(logits, tokens[p + 1 : p + 16]), result.losses[0])


def test_broken_logits_are_refused(engine: Engine) -> None:
    # argmax of NaN is 0: without the check, a broken drafter looks like a bad one, and JSON has no NaN.
    sample = Sample("row 8", np.arange(60, dtype=np.int32))
    with pytest.raises(DFlashError, match=r"row 8: the drafter's logits .* no finite numbers"):
        evaluate(Recorder(engine.session, broken=True), 16, [sample])  # type: ignore[arg-type]


def test_every_format_is_read(tmp_path: Path, engine: Engine) -> None:
    np.save(tmp_path / "a.npy", np.arange(40, dtype=np.uint16).reshape(2, 20))
    (tmp_path / "b.jsonl").write_text(
        '{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}\n\n{"text": "def f():"}\n{"prompt": "x"}\n'
    )
    (tmp_path / "c.txt").write_text("import os\n")
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in ([user], [user, answer])))
    assert engine.chat_template is not None
    asked, answered = read_corpus(
        [tmp_path / "d.jsonl"], engine.tokenizer, engine.n_vocab, template=engine.chat_template
    )
    assert asked.tokens.tolist() == engine.tokenize(engine.chat_template.render([user]), add_bos=False)
    closed = engine.chat_template.render([user, answer], add_generation_prompt=False)
    assert answered.tokens.tolist() == engine.tokenize(closed, add_bos=False)
    files = [tmp_path / name for name in ("a.npy", "b.jsonl", "c.txt")]
    samples = read_corpus(files, engine.tokenizer, engine.n_vocab)
    assert [len(s.tokens) for s in samples][:3] == [20, 20, 3]
    assert samples[2].loss_mask is not None
    assert samples[2].loss_mask.tolist() == [False, True, True]
    assert samples[3].tokens.tolist() == engine.tokenize("def f():")
    assert samples[5].tokens.tolist() == engine.tokenize("import os\n")
    assert len(read_corpus(files, engine.tokenizer, engine.n_vocab, limit=2)) == 2


def shard(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of (type, shape, bytes), of types that numpy lacks too."""
    header: dict[str, Any] = {}
    data = b""
    for name, (kind, shape, content) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.array([[1, 2, 70000]], dtype=np.int32), "row 0: expected token ids in 0..1023.*70000.*position 2"),
        ("a.npy", np.zeros((2, 3), dtype=np.float32), "expected integers"),
        ("a.npy", b"not numpy", "a.npy"),
        ("a.npy", b"", "a.npy.*cannot be read"),
        ("a.npy", np.array([1, 2], dtype="m8[s]"), "expected integers"),
        ("a.npy", b"\x93NUMPY\x01\x00\x06\x00{'a':(", "a.npy: expected a .npy file"),
        ("a.safetensors", shard({"input_ids": ("BF16", [2], bytes(4))}), "input_ids: expected numbers of a type"),
        (
            "a.safetensors",
            shard({"input_ids": ("I32", [2], bytes(8)), "loss_mask": ("F8_E4M3", [2], bytes(2))}),
            "loss_mask: expected numbers of a type",
        ),
        ("a.npy", b"PK\x05\x06" + bytes(18), "a.npy.*npz"),
        ("a.jsonl", b'{"input_ids": [[1], [2, 3]]}\n', r"line 1: expected integer token ids, found \[1\]"),
        ("a.jsonl", b'{"input_ids": [1, 2], "loss_mask": [[1], [1, 1]]}\n', "line 1: loss_mask.*object"),
        ("a.jsonl", b"[" * 100_000, "line 1: expected one JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: text: expected Unicode text"),
        ("a.jsonl", b'{"messages": []}\n', "line 1: messages"),
        ("b.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: messages need a chat template"),
        ("a.jsonl", b'{"input_ids": [1, -2]}\n', "line 1.*-2"),
        ("a.jsonl", b'{"input_ids": [1, 2], "loss_mask": [1]}\n', "line 1: loss_mask"),
        ("a.jsonl", b'{"text": "ok"}\n{"other": 1}\n', "line 2.*input_ids"),
        ("a.jsonl", b"{\n", "line 1: expected one JSON object"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.safetensors", b"12345678", "safetensors"),
    ],
)
def test_wrong_data_is_refused(
    name: str, content: np.ndarray | bytes, message: str, tmp_path: Path, engine: Engine
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    template = engine.chat_template if name.startswith("a") else None
    with pytest.raises(DFlashError, match=message):
        read_corpus([tmp_path / name], engine.tokenizer, engine.n_vocab, template=template)


def test_missing_files_and_empty_corpora_are_refused(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(DFlashError, match="found nothing"):
        read_corpus([tmp_path / "x.npy"], engine.tokenizer, engine.n_vocab)
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(DFlashError, match="at least one sequence"):
        read_corpus([tmp_path / "e.jsonl"], engine.tokenizer, engine.n_vocab)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    write_json_atomically(out, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(out, {"a": object()})
    assert json.loads(out.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_json_goes_into_a_pipe_or_device_and_does_not_replace_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable("--json", pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_json_atomically(pipe, {"a": 1})
    reader.join(10)
    assert [json.loads(text) for text in got] == [{"a": 1}]
    assert pipe.is_fifo()


def test_ctrl_c_leaves_no_file(
    tmp_path: Path, nano_path: Path, nano_drafter_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[int] = []

    @contextmanager
    def interrupting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
        def progress(done: int, total: int) -> None:
            seen.append(done)
            signal.raise_signal(signal.SIGINT)

        yield progress

    monkeypatch.setattr(common, "count_progress", interrupting)
    np.save(tmp_path / "d.npy", np.random.default_rng(0).integers(0, 960, (4, 60)))
    args = ["eval", "--target", nano_path, "--drafter", nano_drafter_path, "--data", tmp_path / "d.npy"]
    assert main([*map(str, args), "--json", str(tmp_path / "o.json")]) == 130
    assert seen == [1], "the first sequence is the last"
    captured = capsys.readouterr()
    assert (captured.out, captured.err.strip()) == ("", "dflash-cpp: interrupted")
    assert [p.name for p in tmp_path.iterdir()] == ["d.npy"]


def test_the_command(
    tmp_path: Path, nano_path: Path, nano_drafter_path: Path, engine: Engine, prompts: list[Ids],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    np.save(tmp_path / "d.npy", own_text(engine, prompts[0]).tokens[None])
    args = ["eval", "--target", str(nano_path), "--drafter", str(nano_drafter_path), "--data", str(tmp_path / "d.npy")]
    assert main([*args, "--json", str(tmp_path / "o.json"), "--anchors", "3", "--anchor-range", "20:90"]) == 0
    assert "m_accept" in capsys.readouterr().out
    found = json.loads((tmp_path / "o.json").read_text())
    assert {"m_accept", "val_loss", "blocks", *(f"k{n}" for n in range(1, 9))} <= found.keys()
    assert found["blocks"] == 3
    assert main([*args, "--anchor-range", "2000:2001"]) == 2
    assert "expected room" in capsys.readouterr().err
    for path in ("no/o.json", "."):  # before any work
        assert main([*args[:-1], "nothing.npy", "--json", str(tmp_path / path)]) == 2
        assert "--json: expected a file that can be written" in capsys.readouterr().err
    for path in (*args[4:7:2], args[2]):  # it would write over the data or a model
        assert main([*args, "--json", path]) == 2
        assert "one of the files to be read" in capsys.readouterr().err
    exchanged = ["eval", "--target", args[4], "--drafter", args[2], "--data", args[6]]
    assert main(exchanged) == 2
    assert "target and drafter may be exchanged" in capsys.readouterr().err


@pytest.mark.parametrize("pair", ["mini", "mini-weak"])
def test_the_table_is_reproduced(pair: str, make_engine: Callable[..., Engine]) -> None:
    data = SHARED / "eval" / "mini-m2-heldout.npy"
    if not data.is_file():
        pytest.skip("needs ../shared/eval")
    engine = make_engine(pair, n_ctx=1024)
    samples = read_corpus([data], None, engine.n_vocab)
    result = evaluate(engine.session, engine.block_size, samples, anchor_range=(256, 1007))
    found = result.to_dict()
    assert found["blocks"] == 1536
    assert {name: found[name] for name in TABLE[pair]} == pytest.approx(TABLE[pair], rel=0.02)
