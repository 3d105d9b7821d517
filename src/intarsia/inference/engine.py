"""Many requests at once on one model: what is asked for goes in, tokens come out, a step at a time.

In a step all texts that run go through the model together, in one row: those that are being continued bring a token
each, prompts a piece each. Nothing here waits or has a thread; whoever calls `step` decides when.

    engine = Engine(model)
    engine.submit(Request(prompt=(1, 2, 3)))
    for event in engine.run():
        ...
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import ConfigError, IntarsiaError, PoolError
from intarsia.inference.batch import Choice, Part
from intarsia.inference.choosing import choose, logprobs_of
from intarsia.inference.drafts import Drafts
from intarsia.inference.pace import Pace
from intarsia.inference.prefix_tree import common_beginning
from intarsia.inference.requests import Ended, Event, Produced, Reason, Request, Text
from intarsia.inference.room import Hits, Room
from intarsia.inference.scheduler import Scheduler, Settings
from intarsia.inference.speculation import Speculation
from intarsia.model import InferenceModel, LanguageModel, ModelStates
from intarsia.ops import Sequences

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What an engine does and has done.

    Attributes:
        running, waiting: texts.
        unread: tokens that are still to be read of those that are not being continued: how far a long prompt is.
        steps, read, produced: steps so far, tokens that the model has read, tokens of answers.
        preempted: how often a text made way for others.
        begun_anew: how often all states were forgotten, since something went wrong that should not.
        guessed, confirmed: tokens that were guessed ahead, and those of them that were right.
        hits: of the prefix cache.
        snapshots: that are kept.
        state_bytes, page_bytes: memory of slots and of pages, which is taken once and stays.
        used_pages: the share of the pages that is in use.
    """

    running: int
    waiting: int
    unread: int
    steps: int
    read: int
    produced: int
    preempted: int
    begun_anew: int
    guessed: int
    confirmed: int
    hits: Hits
    snapshots: int
    state_bytes: int
    page_bytes: int
    used_pages: float


class Engine:
    """Continues texts for many. Not for several threads at once.

    Args:
        model: one that is handed over as a `LanguageModel` is made ready here.
        settings: how much at once, and memory.
        drafts: what guesses ahead, if anything.
        clock: seconds, by which steps are timed.

    Raises:
        ConfigError: a draft model of another vocabulary.
    """

    def __init__(
        self,
        model: InferenceModel | LanguageModel,
        settings: Settings | None = None,
        drafts: Drafts | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model if isinstance(model, InferenceModel) else InferenceModel(model)
        self.settings = settings = settings or Settings()
        self.room = Room(
            self.model,
            settings.slots,
            settings.tokens,
            settings.page_size,
            settings.prefix_cache and settings.snapshots > 0,
        )
        self._speculation = Speculation(drafts, self.room, self.model.config.vocab_size, settings.drafts)
        self._scheduler = Scheduler(settings)
        self._clock = clock
        self._pace = None if settings.step_seconds is None else Pace(settings.step_seconds)
        self._requests: dict[int, list[Text]] = {}
        self._next = 0
        self._steps = self._read = self._produced = self._preempted = self._begun_anew = 0
        self._taken_up: Text | None = None

    @property
    def has_work(self) -> bool:
        """Whether a text waits or runs."""
        return bool(self._scheduler.running or self._scheduler.waiting)

    def submit(self, request: Request) -> int:
        """Take a request; its number, which events tell.

        Raises:
            ConfigError: a token that the model does not have, or a prompt that the memory cannot hold.
        """
        self.check(request)
        number, self._next = self._next, self._next + 1
        self._requests[number] = []
        self._add(request, number, 0)
        return number

    def check(self, request: Request) -> None:
        """Raise what `submit` would raise of this request. May be called from any thread."""
        vocabulary = self.model.config.vocab_size
        wrong = next((token for token in request.prompt if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ConfigError(
                f"the prompt holds token {wrong}, which is outside the vocabulary of {vocabulary}"
            )
        if len(request.prompt) >= self.settings.tokens:
            raise ConfigError(
                f"the prompt has {len(request.prompt)} tokens, and the engine has memory for "
                f"{self.settings.tokens} with the answer"
            )

    def cancel(self, number: int) -> list[Event]:
        """End a request's answers where they are; what one that has ended already tells is nothing."""
        texts = self._requests.get(number, [])
        # Those that were to come with the first are not there yet, and do not come.
        events: list[Event] = []
        for text in [*texts]:
            if not text.ended:
                with self._recovering(events):
                    self._end(text, "cancelled", events)
        return events

    def step(self) -> list[Event]:
        """Let all that can go on go on by one piece or token; what has become of it."""
        events: list[Event] = []
        with self._recovering(events):
            self._step(events)
        return events

    def run(self) -> Iterator[Event]:
        """Step until all requests have their answers."""
        while self.has_work:
            yield from self.step()

    def report(self) -> Report:
        """What it does and has done."""
        room, scheduler, ahead = self.room, self._scheduler, self._speculation
        reading = [text for text in (*scheduler.running, *scheduler.waiting) if not scheduler.continues(text)]
        return Report(
            running=len(scheduler.running), waiting=len(scheduler.waiting),
            unread=sum(text.pending for text in reading), steps=self._steps, read=self._read,
            produced=self._produced, preempted=self._preempted, begun_anew=self._begun_anew,
            guessed=ahead.guessed, confirmed=ahead.confirmed, hits=room.hits, snapshots=len(room.tree.snapshots()),
            state_bytes=room.state_bytes, page_bytes=room.page_bytes, used_pages=room.used_pages,
        )  # fmt: skip

    def check_integrity(self) -> None:
        """Raise IntarsiaError unless requests, memory and the tree of prefixes fit together."""
        running = self._scheduler.running
        for text in (*running, *self._scheduler.waiting):
            text.check_integrity()
            if (text.slot is not None) != (text in running) or text.ended:
                raise IntarsiaError(
                    f"a text is in slot {text.slot}, ended: {text.ended}, running: {text in running}"
                )
        slots = {text.slot: text.seen for text in running if text.slot is not None}
        if len(slots) < len(running) or len(running) > self.settings.sequences:
            raise IntarsiaError(f"{len(running)} texts run in the slots {sorted(slots)}")
        listed = [text for texts in self._requests.values() for text in texts if not text.ended]
        if set(listed) != {*running, *self._scheduler.waiting}:
            raise IntarsiaError("the texts of requests are not those that wait or run")
        self.room.check_integrity(slots)

    def _step(self, events: list[Event]) -> None:
        self._take_up()
        choices = [
            Choice(text, text.ready[None]) for text in self._scheduler.running if text.ready is not None
        ]
        parts, states = self._plan()
        if states is not None:
            try:
                logits = self._forward(parts, states)
            except Exception as error:  # whatever it is, the others are served
                return self._fail(parts, error, events)
            choices += self._note(parts, logits)
        self._steps += bool(choices or parts)
        begun = [Choice(other, each.logits) for each in choices for other in self._others(each)]
        return self._continue([*choices, *begun], events)

    def _add(self, request: Request, identity: int, number: int) -> Text:
        """A text of a request, which waits."""
        text = Text(request, identity, number)
        text.most = min(request.max_tokens, self.settings.tokens - len(request.prompt))
        self._requests[identity].append(text)
        self._scheduler.add(text)
        return text

    def _take_up(self) -> None:
        """Let texts run that wait, as far as there are places and memory. One whose beginning is being read by another
        waits for that. Of those that go alone one runs at a time."""
        for text in sorted(self._scheduler.waiting, key=lambda each: not each.alone):
            if self._scheduler.is_full or any(other.alone for other in self._scheduler.running):
                break
            self._taken_up = text
            found = self.room.find(text.tokens)
            if any(self._reads_for(other, text, found.tokens) for other in self._scheduler.running):
                continue
            slots = [other.slot for other in self._scheduler.running if other.slot is not None]
            if slots and not self.room.has_room(slots, len(text.tokens) + 1, found):
                break
            slot = self.room.begin(found)
            if slot is None:
                break
            self._scheduler.start(text)
            text.slot, text.seen = slot, found.tokens
            if found.known > found.tokens:
                text.places.add(found.known)
            if not text.pending and found.node is not None and found.node.snapshot is not None:
                text.ready = found.node.snapshot.logits
            if text.cached is None:
                text.cached = found.tokens
                self.room.note(found)
        self._taken_up = None

    def _reads_for(self, other: Text, text: Text, found: int) -> bool:
        """Whether another text is reading a beginning that `text` has in common with it and of which less is there."""
        if not self.room.caches or not other.pending or other.produced:
            return False
        common = common_beginning(other.tokens, text.tokens, len(text.tokens) - 1)
        if common <= other.seen or common < found + self.settings.page_size:
            return False
        other.places.add(common)
        return True

    def _plan(self) -> tuple[list[Part], ModelStates | None]:
        """What each text does in the next step, and the states for it, with room. Where memory is too small guesses
        are left out, and then texts make way, the last ones first."""
        guesses = True
        beside = None if self._pace is None else self._pace.tokens(self.settings.step_tokens)
        while True:
            parts = [Part(text, count) for text, count in self._scheduler.pieces(beside)]
            if not parts:
                return [], None
            if guesses:
                left = self.settings.step_tokens - sum(part.count for part in parts)
                guesses = self._speculation.guess(parts, left)
            entries = [entry for part in parts for entry in part.entries()]
            try:
                return parts, self.room.view(
                    [entry.slot for entry in entries], [len(entry.tokens) for entry in entries]
                )
            except PoolError:
                self._speculation.drop(parts)
                if guesses:
                    guesses = False
                elif len(self._scheduler.running) > 1:
                    self._make_wait(self._scheduler.last)
                else:
                    raise

    def _forward(self, parts: list[Part], states: ModelStates) -> list[Tensor]:
        """Of each part the logits that it wants, `[wanted, vocab]`."""
        entries = [entry for part in parts for entry in part.entries()]
        row = torch.tensor([[t for entry in entries for t in entry.tokens]], device=self.model.device)
        wanted = [entry.logits for entry in entries]
        wanted[0] = wanted[0] if any(wanted) else 1  # one at least; nobody looks at it
        begun = self._clock()
        out = self.model(row, states, Sequences(tuple(len(e.tokens) for e in entries)), last_only=wanted)
        assert out.logits is not None
        logits = out.logits[0].cpu()
        self._read += row.shape[1]
        if self._pace is not None:
            reading = sum(part.count for part in parts if not self._scheduler.continues(part.text))
            continued = any(self._scheduler.continues(part.text) for part in parts)
            self._pace.note(reading, continued, self._clock() - begun)
        found = iter(logits.split(wanted))
        return [[next(found) for _ in part.entries()][-1] for part in parts]

    def _note(self, parts: list[Part], logits: list[Tensor]) -> list[Choice]:
        """Write down what has been read, and keep states where they will be of use."""
        choices = []
        for part, rows in zip(parts, logits, strict=True):
            text, chooses = part.text, part.chooses
            text.seen += part.count
            assert text.slot is not None
            if self._scheduler.is_place(text) and not part.guesses:
                at_the_end = rows[0] if chooses and not text.produced else None
                self.room.keep(text.part(0, text.seen), text.slot, at_the_end)
            if chooses:
                choices.append(Choice(text, rows, part))
        return choices

    def _others(self, choice: Choice) -> list[Text]:
        """The other answers of a request whose prompt has just been read: those that go on in a fork. The rest wait,
        and read it again where no state of it is left."""
        first, begun = choice.text, []
        there = len(self._requests[first.identity])
        for number in range(there, first.request.count):
            text = self._add(first.request, first.identity, number)
            assert first.slot is not None
            slot = None if self._scheduler.is_full else self.room.fork(first.slot)
            if slot is not None:
                self._scheduler.start(text)
                text.slot, text.seen, text.cached = slot, first.seen, first.seen
                begun.append(text)
        return begun

    def _continue(self, choices: list[Choice], events: list[Event]) -> None:
        """Choose the next token of each text, and those behind it as long as they were guessed right."""
        first = choose([(choice.text, choice.logits[0]) for choice in choices]) if choices else []
        for choice, token in zip(choices, first, strict=True):
            choice.text.ready = None
            self._continue_one(choice, token, events)

    def _continue_one(self, choice: Choice, token: int | IntarsiaError, events: list[Event]) -> None:
        text, guesses, right = choice.text, choice.guesses, 0
        while True:
            reason: Reason | None = "error" if isinstance(token, IntarsiaError) else None
            if isinstance(token, int):
                reason = "stop" if token in text.request.stop else None
                if reason is None:
                    self._append(text, token, choice.logits[right], events)
                    reason = "length" if text.produced == text.most else None
            if reason is not None or right == len(guesses) or guesses[right] != token:
                break
            right += 1
            (token,) = choose([(text, choice.logits[right])])
        if choice.part is not None and guesses:
            self._speculation.settle(choice.part, right)
        if reason is not None:
            self._end(text, reason, events, token if isinstance(token, IntarsiaError) else None)

    def _append(self, text: Text, token: int, logits: Tensor, events: list[Event]) -> None:
        told = Produced(text.identity, text.number, token, logprobs_of(text.request.logprobs, token, logits))
        if text.constraint is not None:
            text.constraint.accept(token)
        text.tokens.append(token)
        text.alone = False
        self._produced += 1
        events.append(told)

    def _make_wait(self, text: Text, keep: bool = True) -> None:
        """Let a text make way. What it has read is kept as long as there is room, unless nobody can trust it."""
        assert text.slot is not None
        self._speculation.release(text)
        if keep:
            self.room.keep_last(text.part(0, text.seen), text.slot)
        else:
            self.room.pool.free(text.slot)
        text.slot, text.seen, text.ready = None, 0, None
        self._preempted += 1
        self._scheduler.wait(text)

    def _end(
        self, text: Text, reason: Reason, events: list[Event], error: IntarsiaError | None = None
    ) -> None:
        """End a text, and tell it; its state is kept for texts that go on from it."""
        self._scheduler.remove(text)
        texts, count = self._requests[text.identity], text.request.count
        prompt, cached = len(text.request.prompt), text.cached or 0
        events.append(Ended(text.identity, text.number, reason, prompt, cached, text.produced, error))
        # Those that were to begin with it do not.
        events += [Ended(text.identity, n, reason, prompt, 0, 0, error) for n in range(len(texts), count)]
        slot, text.slot, text.ended = text.slot, None, True
        if all(each.ended for each in texts):
            del self._requests[text.identity]
        self._speculation.release(text)
        if slot is not None:
            if error is None:
                self.room.keep_last(text.part(0, text.seen), slot)
            else:
                self.room.pool.free(slot)

    def _fail(self, parts: list[Part], error: Exception, events: list[Event]) -> None:
        """End the text of a step in which the model went wrong. Of several nobody knows whose fault it was: each is
        read again, from what was kept before, and goes through the model alone until it has a token more."""
        self._speculation.drop(parts)
        if len(parts) > 1:
            for part in parts:
                part.text.alone = True
                self._make_wait(part.text, keep=False)
            return
        for part in parts:
            self._end(part.text, "error", events, _told("the model failed", error))

    @contextmanager
    def _recovering(self, events: list[Event]) -> Iterator[None]:
        """What is done in it may go wrong: then the engine begins anew."""
        self._taken_up = None
        try:
            yield
        except Exception as error:
            LOG.exception("the engine begins anew: what it had in memory cannot be trusted")
            self._begin_anew(error, events)

    def _begin_anew(self, error: Exception, events: list[Event]) -> None:
        """Forget all states, and read texts again from what they say. Those that ran go alone until they have a token
        more; one that went alone already, and was there again, is to blame and ends."""
        self._begun_anew += 1
        texts = [text for texts in self._requests.values() for text in texts if not text.ended]
        taken_up, running = self._taken_up, self._scheduler.running
        suspects = running if taken_up is None else [taken_up]
        blamed = next((text for text in sorted(suspects, key=lambda each: each.order) if text.alone), None)
        self._scheduler = Scheduler(self.settings)
        for text in texts:
            self._speculation.release(text)
        self.room.begin_anew()
        for text in texts:
            text.begin_again()
            text.alone = text.alone or text in suspects
            self._scheduler.add(text)
        for text in texts:
            if text is blamed:
                self._end(text, "error", events, _told("the engine failed", error))
            elif text.produced == text.most:
                self._end(text, "length", events)


def _told(what: str, error: Exception) -> IntarsiaError:
    told = error if isinstance(error, IntarsiaError) else IntarsiaError(f"{what}: {error!r}")
    told.__cause__ = None if told is error else error
    return told
