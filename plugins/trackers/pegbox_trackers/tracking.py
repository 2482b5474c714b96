"""What trackers are told about a run: its config and plan at the start, figures as they are logged, and how it ended.

`trackers.json` in the run's folder keeps the id that each tracker gave its run, so that a run that goes on after a stop
goes on there as well. Names: `train/loss`, `eval/loss` ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pegbox.events import Evaluated, Event, Logged, RunEnded, RunFailed, RunStarted

from pegbox_trackers.config import TrackersConfig
from pegbox_trackers.libraries import LIBRARIES, Start

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from pegbox.context import Context
    from pegbox.plan import Plan

IDS = "trackers.json"
Value = str | int | float | bool


class Tracking:
    """The trackers of one run. What one of them raises keeps no other one from being told."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._trackers: dict[str, GeneralTracker] = {}

    def take(self, event: Event) -> None:
        """Pass one event on.

        Raises:
            ExceptionGroup: what trackers raised, after all were told.
        """
        match event:
            case RunStarted():
                self._start(event.step)
            case Logged():
                self._each(lambda tracker: tracker.log(named("train", event.metrics), step=event.step))
            case Evaluated():
                self._each(lambda tracker: tracker.log(named("eval", event.metrics), step=event.step))
            case RunEnded():
                self._each(lambda tracker: tracker.finish())
                self._trackers.clear()
            case RunFailed():
                self._fail()

    def _start(self, step: int) -> None:
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it for the rank; the one that the runtime made, if it made one
        config, errors = self._ctx.section(TrackersConfig), []
        known = self._known() if self._ctx.config.run.resume is not None else {}
        values = description(self._ctx.config.origins(), self._ctx.plan)
        for name in config.chosen():
            library = LIBRARIES[name]
            try:
                tracker = library.make(getattr(config, name), Start(self._ctx.folder, step, known.get(name)))
                tracker.start()
                if name not in known:
                    tracker.store_init_configuration(dict(values))
                known[name] = str(library.run_id(tracker))
                self._trackers[name] = tracker
            except Exception as error:
                error.add_note(f"{name} does not track this run")
                errors.append(error)
        self._ctx.folder.mkdir(parents=True, exist_ok=True)
        (self._ctx.folder / IDS).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        if errors:
            raise ExceptionGroup("trackers that did not start", errors)

    def _known(self) -> dict[str, str]:
        file = self._ctx.folder / IDS
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def _each(self, tell: Callable[[GeneralTracker], None]) -> None:
        errors = []
        for name, tracker in self._trackers.items():
            try:
                tell(tracker)
            except Exception as error:
                error.add_note(f"from {name}")
                errors.append(error)
        if errors:
            raise ExceptionGroup("trackers that failed", errors)

    def _fail(self) -> None:
        ending = {id(tracker): LIBRARIES[name].fail for name, tracker in self._trackers.items()}
        self._each(lambda tracker: (ending[id(tracker)] or type(tracker).finish)(tracker))
        self._trackers.clear()


def named(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Figures under the name of their split: `eval_loss` becomes `eval/loss`."""
    return {f"{split}/{name.removeprefix(f'{split}_')}": value for name, value in metrics.items()}


def description(origins: Iterator[tuple[str, Any, str]], plan: Plan) -> dict[str, Value]:
    """Every key of the config, and who does what, as plain values: what trackers show as parameters of a run."""
    found: dict[str, Value] = {key: plain(value) for key, value, _ in origins}
    found["plan.digest"] = plan.digest()
    found["plan.plugins"] = ", ".join(f"{name} ({origin})" for name, origin in plan.plugins)
    for job in plan.jobs:
        wrapped = f", wrapped by {', '.join(job.wrappers)}" if job.wrappers else ""
        found[f"plan.{job.hook}"] = ", ".join(job.plugins) + wrapped
    return found


def plain(value: Any) -> Value:
    """A value that every tracker takes as a parameter."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
