"""Engine: the package's front door. Tokens, text and bookkeeping; all arithmetic is in the compiled core."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _core
from .chat import ChatTemplate, Message, parse_reply
from .errors import CapacityError, DFlashError
from .options import EngineOptions, GenerateOptions, check_path, make_options, option_names
from .stats import Stats, plain_cost, total_seconds
from .stops import StopMatcher
from .tokenizer import Tokenizer, check_token_ids

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .options import EngineKwargs, GenerateKwargs

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]
FinishReason = Literal["stop", "length", "context", "cancelled"]
PrefillProgress = Callable[[int, int], None]

_FINISH: dict[str, FinishReason] = {"eos": "stop", "length": "length", "context": "context"}


@dataclass(frozen=True)
class Piece:
    """What one round added to an answer.

    text: whole characters only; may be empty while a character or a possible stop string is incomplete.
    tokens: the ids committed; empty for the last piece where only held-back text remained.
    """

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """One answer.

    text: without special tokens, and without the stop string that ended it.
    tokens: the ids generated, up to and including the end-of-sequence token or the one completing a stop string.
    finish_reason: "stop" (end of sequence or stop string), "length" (max_tokens), "context" (n_ctx reached) or
        "cancelled" (a stream that was closed early).
    stop: the stop string that ended it, or None.
    message: after `chat`, the assistant message to append to the conversation; otherwise None.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    stop: str | None = None
    message: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Request:
    """A checked request: nothing in it can be wrong any more except the room left in the context."""

    tokens: list[int]
    options: GenerateOptions
    seed: int
    depth: int
    max_tokens: int
    eos_ids: tuple[int, ...]
    chat_prompt: str | None
    on_prefill: PrefillProgress | None


@dataclass
class _Answer:
    """What has come of a request so far.

    stats: as of the last `read_stats`; empty until the prompt was begun.
    plain_round_seconds: of the whole session; None when it was not asked for, or never measured.
    """

    tokens: list[int] = field(default_factory=list)
    stats: Mapping[str, Any] = field(default_factory=dict)
    prompt_seconds: float = 0.0
    plain_round_seconds: float | None = None
    stop: str | None = None
    finish: FinishReason | None = None
    cancelled: bool = False

    def read_stats(self, session: _core.Session) -> None:
        """Takes the session's figures, which are this answer's until another one begins."""
        self.stats = session.stats()
        if plain_cost(self.stats) is None:
            self.plain_round_seconds = plain_cost(session.session_stats())


@dataclass
class _Spent:
    """What a session's generations took beside what it counts itself: seconds until their prompts were in."""

    prompt_seconds: float = 0.0


def _run(
    session: _core.Session, tokenizer: Tokenizer, request: _Request, answer: _Answer, spent: _Spent
) -> Generator[Piece, None, None]:
    """THE loop: prefill, then rounds; every way of generating goes through it."""
    options = request.options
    decoder, matcher = tokenizer.stream(), StopMatcher(options.stops)
    session.begin(
        request.tokens,
        options.sampling_params(request.seed),
        max_tokens=request.max_tokens,
        depth=request.depth,
        eos_ids=request.eos_ids,
        lookup=options.lookup,
    )
    done, total = -1, 0
    try:
        while done < total and not answer.cancelled:
            done, total = session.prefill()
            if request.on_prefill is not None:
                request.on_prefill(done, total)
    finally:
        answer.stats = session.stats()
        answer.prompt_seconds = total_seconds(answer.stats)
        spent.prompt_seconds += answer.prompt_seconds
    while answer.finish is None and not answer.cancelled:
        step = session.step()
        kept: list[int] = []
        text = ""
        for token in step.tokens:
            kept.append(token)
            text += matcher.push(decoder.push(token))
            if matcher.matched is not None:
                break  # tokens behind the stop string would not exist at depth 0
        answer.tokens += kept
        if matcher.matched is not None:
            answer.stop, answer.finish = matcher.matched, "stop"
        elif step.stop is not None:
            answer.finish = _FINISH[step.stop]
            text += matcher.push(decoder.flush()) + matcher.flush()
        if answer.finish is not None:  # not every round: a few microseconds of dictionaries a token
            answer.read_stats(session)
        yield Piece(text, tuple(kept))


class Stream(Iterator[Piece]):
    """Pieces of one answer, computed as they are asked for. `result` is the whole answer.

    The engine is taken when the first piece is asked for and given back at the end, at `close()`, after an error,
    or when the object is dropped.
    """

    def __init__(self, engine: Engine, request: _Request) -> None:
        self._engine = engine
        self._request = request
        self._answer = _Answer()
        self._text: list[str] = []
        self._superseded = False
        self._running = False
        self._thread = 0
        # The loop knows the answer but not this object, so that a dropped stream is freed at once.
        self._pieces = _run(engine.session, engine.tokenizer, request, self._answer, engine._spent)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        with self._engine._turn:  # nobody reads the session between being taken and running
            self._acquire()
            self._thread = threading.get_ident()
            self._running = True
        try:
            piece = next(self._pieces)
        except BaseException:
            self._end()
            raise
        finally:
            with self._engine._turn:
                self._running = False
                self._engine._turn.notify_all()
        self._text.append(piece.text)
        if self._answer.finish is not None:
            self._engine._give(self)
        return piece

    def _acquire(self) -> None:
        """Takes the engine for the next piece, with the lock held. Raises StopIteration when there is none."""
        while True:
            if self._superseded:
                self._engine._open_session()  # raises where the engine is closed
                raise DFlashError(
                    "stream: a later call on the same engine replaced it; finish a stream first, or use a second engine"
                )
            if self._answer.finish is not None:
                raise StopIteration
            if not self._running:
                self._engine._take(self)  # may wait, and let another thread that shares this stream go first
                if not self._running and self._answer.finish is None:
                    return
                if self._answer.finish is not None:
                    self._engine._give(self)
            elif self._thread == threading.get_ident():
                raise DFlashError("stream: a hook or progress function asked the stream that is calling it for a piece")
            else:
                self._engine._turn.wait()

    @property
    def result(self) -> Generation:
        """The answer; while pieces are still to come, what there is so far, with finish_reason "cancelled".

        Read from another thread during a round, its statistics are those of the last reading.
        """
        self._read_stats()
        answer, request = self._answer, self._request
        message = None
        if request.chat_prompt is not None:
            message = parse_reply(self._engine.tokenizer, request.chat_prompt, answer.tokens, answer.stop)
        return Generation(
            text="".join(self._text),
            tokens=list(answer.tokens),
            finish_reason=answer.finish or "cancelled",
            stats=Stats.from_core(
                answer.stats,
                seed=request.seed,
                generated_tokens=len(answer.tokens),
                prompt_seconds=answer.prompt_seconds,
                plain_round_seconds=answer.plain_round_seconds,
            ),
            stop=answer.stop,
            message=message,
        )

    def close(self) -> None:
        """Stops here and gives the engine back. Idempotent; from another thread, after the running round."""
        self._answer.cancelled = True
        if not self._running:
            self._pieces.close()
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._end()

    def _supersede(self) -> None:
        self._superseded = True
        self.close()

    def _read_stats(self) -> None:
        """Brings the statistics up to date, where the session is this stream's and no other thread is running it."""
        engine = self._engine
        with engine._turn:
            mine = engine._active_user() is self and self._answer.finish is None and bool(self._answer.stats)
            if mine and engine._idle_for(threading.get_ident()) and engine._session is not None:
                self._answer.read_stats(engine._session)

    def _end(self) -> None:
        if self._answer.finish is None:
            self._read_stats()
            self._answer.finish = "cancelled"
        self._engine._give(self)


class Engine:
    """A target, an optional drafter, and one timeline on one backend.

    Consecutive calls keep the common prefix of their tokens in the cache, so a conversation costs its new tokens
    only. One engine does one thing at a time: a call from another thread waits until the running one has finished;
    a call from the thread that left a stream unfinished replaces that stream. Engines do not disturb each other.

    target, drafter: GGUF files made by `dflash-cpp convert` (or by llama.cpp's converter).
    options: see `EngineOptions`.
    Raises DFlashError for files and options that do not fit, CapacityError when memory is short.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        drafter: str | os.PathLike[str] | None = None,
        **options: Unpack[EngineKwargs],
    ) -> None:
        self.options = make_options(EngineOptions, options)
        target_path = check_path("target", target)
        drafter_path = None if drafter is None else check_path("drafter", drafter)
        gguf = _core.Gguf(target_path)
        self.tokenizer = Tokenizer(gguf)
        self.chat_template = ChatTemplate.from_gguf(gguf, self.tokenizer)
        """The file's chat template, or None."""
        del gguf
        self._turn = threading.Condition()
        self._active: weakref.ref[Any] | None = None
        self._spent = _Spent()
        self._session: _core.Session | None = None
        self.model = _core.Model(
            target_path,
            drafter_path,
            backend=self.options.backend,
            n_threads=self.options.n_threads or 0,
            precise=self.options.precise,
            cpu_isa=self.options.cpu_isa,
            repack=self.options.repack,
            numa=self.options.numa,
            progress=self.options.progress,
            n_ctx=self.options.n_ctx,
            kv_type=self.options.kv_type,
            n_batch=self.options.n_batch,
            draft_head=self.options.draft_head,
        )
        """The compiled model: configurations and backend."""
        if self.model.memory_warning:
            warnings.warn(self.model.memory_warning, RuntimeWarning, stacklevel=2)
        self._session = self._new_session()
        self.n_vocab = int(self.model.target_config["n_vocab"])
        """Rows of the target's head; the tokenizer may know fewer."""

    # -- generation

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[GenerateKwargs],
    ) -> Generation:
        """Generates an answer to a text, to token ids, or to chat messages.

        options: see `GenerateOptions`. Neither the depth nor the drafter changes the answer.
        Raises DFlashError for wrong input and CapacityError for a prompt that does not fit, before any work.
        """
        stream = self.stream(prompt, messages=messages, tools=tools, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        on_prefill: PrefillProgress | None = None,
        **options: Unpack[GenerateKwargs],
    ) -> Stream:
        """Like `generate`, as an iterator of `Piece`; its `result` is the `Generation`.

        on_prefill: called with (done, total) prompt tokens after each chunk.
        """
        checked = make_options(GenerateOptions, options, known=("prompt", "messages", "tools"))
        self._open_session()
        return Stream(self, self._request(prompt, messages, tools, checked, on_prefill))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[GenerateKwargs],
    ) -> Generation:
        """Answers a conversation through the GGUF's chat template; append `.message` to go on."""
        return self.generate(messages=messages, tools=tools, **options)

    def reset(self) -> None:
        """Forgets the timeline, so that the next call starts from nothing."""
        with self._exclusive() as session:
            session.rewind(0)

    # -- text

    def tokenize(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of text; add_bos as `Tokenizer.encode` has it."""
        return self.tokenizer.encode(text, add_bos=add_bos)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; special: show special tokens too. Ids that the tokenizer does not know have no text."""
        if isinstance(tokens, (str, bytes)):
            raise DFlashError(f"tokens: expected token ids, found {type(tokens).__name__}")
        ids = check_token_ids(tokens, self.n_vocab, name="tokens") if len(tokens) else []
        return self.tokenizer.decode(ids, special=special)

    # -- numbers, for people who study models; each replaces the timeline

    def logits(self, tokens: Prompt) -> NDArray[np.float32]:
        """Target logits after every position, [n, n_vocab]."""
        ids = self._fitting(self._ids(tokens, "tokens"))
        with self._exclusive() as session:
            return session.logits(ids)

    def taps(self, tokens: Prompt) -> NDArray[np.float32]:
        """Residual stream entering each tapped layer, [n, n_taps, n_embd]. Needs a drafter, which says which layers."""
        self._need_drafter("taps")
        ids = self._fitting(self._ids(tokens, "tokens"))
        with self._exclusive() as session:
            return session.taps(ids)

    def draft_logits(
        self, tokens: Prompt, anchor: int, n: int | None = None, *, block_rows: int = 0
    ) -> NDArray[np.float32]:
        """Drafter logits of slots 1..n, [n, n_vocab], after tokens as context and anchor in slot 0.

        n: None: all slots. block_rows: rows the drafter computes, n + 1..block_size; 0: the engine's choice.
        """
        last = self._need_drafter("draft_logits") - 1
        ids = self._fitting(self._ids(tokens, "tokens"))
        check_token_ids([anchor], self.n_vocab, name="anchor")
        wanted = last if n is None else n
        if isinstance(wanted, bool) or not isinstance(wanted, (int, np.integer)) or not 1 <= wanted <= last:
            raise DFlashError(f"n: expected an integer in 1..{last} (the drafter's slots), found {wanted!r}")
        with self._exclusive() as session:
            return session.draft_logits(ids, int(anchor), int(wanted), block_rows)

    # -- state

    @property
    def n_ctx(self) -> int:
        """Tokens of context."""
        return self._open_session().n_ctx

    @property
    def block_size(self) -> int:
        """Rows of a drafter block (one more than the deepest depth); 1 without a drafter."""
        self._open_session()
        config = self.model.drafter_config
        return 1 if config is None else int(config["block_size"])

    @property
    def session(self) -> _core.Session:
        """The compiled timeline, for experiments; do not use it while a stream is running."""
        return self._open_session()

    @property
    def session_stats(self) -> Stats:
        """Statistics over all generations of this engine, one that is under way included.

        An unfinished stream goes on; while another thread runs a round, this waits for its end.
        """
        with self._turn:
            while not self._idle_for(threading.get_ident()):
                self._turn.wait()
            raw = self._open_session().session_stats()
            return Stats.from_core(raw, prompt_seconds=self._spent.prompt_seconds)

    def close(self) -> None:
        """Frees model and cache, after the running call. Idempotent; every later call raises DFlashError."""
        with self._turn:
            if self._session is None:
                return
        with self._exclusive():
            self._session = None
            del self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- inside

    def _new_session(self) -> _core.Session:
        o = self.options
        return _core.Session(self.model, n_ctx=o.n_ctx, kv_type=o.kv_type, n_batch=o.n_batch)

    def _open_session(self) -> _core.Session:
        if self._session is None:
            raise DFlashError("engine: it is closed; make a new Engine")
        return self._session

    def _need_drafter(self, what: str) -> int:
        self._open_session()
        if self.model.drafter_config is None:
            raise DFlashError(f"{what}: expected an engine with a drafter, found none; give Engine(..., drafter=FILE)")
        return self.block_size

    def _ids(self, prompt: Prompt, name: str) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not ids:
                raise DFlashError(f"{name}: expected text, found an empty string")
        elif isinstance(prompt, (Sequence, np.ndarray)) and not isinstance(prompt, (bytes, bytearray)):
            ids = prompt  # type: ignore[assignment]
        else:
            raise DFlashError(f"{name}: expected text or token ids, found {type(prompt).__name__}")
        return check_token_ids(ids, self.n_vocab, name=name)

    def _fitting(self, ids: list[int], name: str = "tokens") -> list[int]:
        if len(ids) > self.n_ctx:
            raise CapacityError(
                f"{name}: expected at most n_ctx = {self.n_ctx} tokens, found {len(ids)}; shorten it or raise n_ctx"
            )
        return ids

    def _request(
        self,
        prompt: Prompt | None,
        messages: Sequence[Message] | None,
        tools: Sequence[Mapping[str, Any]] | None,
        options: GenerateOptions,
        on_prefill: PrefillProgress | None,
    ) -> _Request:
        chat_prompt = None
        if (prompt is None) == (messages is None):
            raise DFlashError(
                f"prompt: expected either a prompt or messages, found {'none' if prompt is None else 'both'}"
            )
        if messages is not None:
            if self.chat_template is None:
                raise DFlashError("messages: the target file has no chat template; give a prompt instead")
            chat_prompt = self.chat_template.render(messages, tools=tools)
            # the template writes the begin-of-sequence token itself
            ids = check_token_ids(self.tokenizer.encode(chat_prompt, add_bos=False), self.n_vocab, name="messages")
        elif tools is not None:
            raise DFlashError("tools: expected messages with them, found a plain prompt")
        else:
            assert prompt is not None
            ids = self._ids(prompt, "prompt")
        self._fitting(ids, "prompt")
        return _Request(
            tokens=ids,
            options=options,
            seed=options.resolved_seed(),
            depth=self._depth(options.depth),
            max_tokens=self.n_ctx if options.max_tokens is None else min(int(options.max_tokens), self.n_ctx),
            eos_ids=() if options.ignore_eos else self.tokenizer.eos_ids,
            chat_prompt=chat_prompt,
            on_prefill=on_prefill,
        )

    def _depth(self, depth: int | Literal["auto"]) -> int:
        if depth == "auto":
            return -1
        if depth > 0:
            if self.model.drafter_config is None:
                raise DFlashError(f"depth: expected 0 or 'auto' without a drafter, found {depth}")
            if depth >= self.block_size:
                raise DFlashError(
                    f"depth: expected 'auto' or 0..{self.block_size - 1} (the drafter's block has "
                    f"{self.block_size} rows), found {depth}"
                )
        return int(depth)

    def _take(self, user: Stream | _Call) -> None:
        """Waits for the engine; raises DFlashError when it is closed meanwhile."""
        with self._turn:
            while (active := self._active_user()) is not None and active is not user:
                if isinstance(active, Stream) and active._thread == threading.get_ident() and not active._running:
                    active._supersede()
                elif active._thread == threading.get_ident():
                    raise DFlashError("engine: a hook or progress function called the engine that is calling it")
                else:
                    self._turn.wait()
            self._active = weakref.ref(user)

    def _give(self, user: Stream | _Call) -> None:
        with self._turn:
            if self._active is not None and self._active() in (user, None):
                self._active = None
                self._turn.notify_all()

    def _active_user(self) -> Stream | _Call | None:
        return None if self._active is None else self._active()

    def _idle_for(self, thread: int) -> bool:
        """Whether no thread but this one is inside the session; ask with the lock held."""
        user = self._active_user()
        return user is None or user._thread == thread or (isinstance(user, Stream) and not user._running)

    @contextmanager
    def _exclusive(self) -> Iterator[_core.Session]:
        user = _Call()
        self._take(user)
        try:
            yield self._open_session()
        finally:
            self._give(user)


class _Call:
    """A use of the engine that is not a stream."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()


def generate(
    target: str | os.PathLike[str],
    prompt: Prompt | None = None,
    drafter: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Generation:
    """Loads, generates once and frees everything: `Engine(target, drafter).generate(prompt)`.

    options: those of `EngineOptions` and `GenerateOptions` together, and `messages` and `tools`.
    """
    engine_names, asked = option_names(EngineOptions), ("messages", "tools")
    for_engine = {k: v for k, v in options.items() if k in engine_names}
    request = {k: v for k, v in options.items() if k in asked}
    rest = {k: v for k, v in options.items() if k not in engine_names and k not in asked}
    make_options(GenerateOptions, rest, known=(*engine_names, *asked))  # wrong options before minutes of loading
    with Engine(target, drafter, **for_engine) as engine:
        return engine.generate(prompt, **request, **rest)
