"""The trials of a search as an Optuna study, for optuna.visualization, and its figures in the style of the pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from optuna import create_study, logging
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState, create_trial
from optuna.visualization import (
    plot_edf,
    plot_intermediate_values,
    plot_optimization_history,
    plot_parallel_coordinate,
    plot_param_importances,
    plot_slice,
)
from plotly.colors import sample_colorscale

from mimkd_ray.pages.figures import BLUE, ORANGE, RED, on_lines, plot_text
from mimkd_ray.search.trials import Trial, Value, direction, param_names, ranked, value_text

LABELS = {
    "top1": "held-out top-1 (%)",
    "cross_entropy": "held-out cross-entropy (nats)",
    "knn": "held-out k-NN top-1 (%)",
}

LARGEST = 1e100
"""Largest magnitude that axes can show: browsers cannot draw numbers close to the limit of a double."""

LOG_SPAN = 8.0
"""Ratio of the largest to the smallest positive value from which an axis is logarithmic."""

FEW = 6
"""Most different numbers that each have their own tick: four widths are not read off a logarithmic axis."""

LEAST_TRIALS = 8
"""Fewest trials for which importances are computed."""

MOST_WEIGHED = 200
"""Most trials that importances are computed from, of evenly spaced ranks: of 1,000 it takes a minute."""

MOST_LINES = 100
"""Most trials that have a line in parallel coordinates and a learning curve: the best ones."""

SCALE = [[0, ORANGE], [1, BLUE]]
"""Colours that can be seen on a light page and on a dark one; Optuna's run into white."""


def can_draw(value: Value | None) -> TypeGuard[float]:
    """Return whether a value is a number, finite, and of a magnitude that an axis can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


class Study:
    """An Optuna study with the scored trials of a search as complete ones, and the others as failed."""

    def __init__(self, trials: Sequence[Trial], metric: str) -> None:
        logging.set_verbosity(logging.ERROR)  # not a line about each study in memory
        self.metric, self._trials = metric, trials
        self.scored = [trial for trial in ranked(trials, metric) if can_draw(trial.score)]
        """Trials that figures show, the best first."""
        values = {name: [v for t in self.scored if (v := _value(t, name)) is not None] for name in param_names(trials)}
        self.varying = [name for name, had in values.items() if len(set(map(value_text, had))) > 1]
        """Parameters that differ among them."""
        self.shared = [name for name in self.varying if len(values[name]) == len(self.scored)]
        """Those that each of them has."""
        self._spaces = {name: _distribution(values[name]) for name in self.varying}
        self._study = self._with(self.scored)

    def history(self) -> Any:
        """Return the score by trial, and the best so far."""
        figure = plot_optimization_history(self._study, target_name=LABELS[self.metric])
        figure.update_traces(marker={"color": BLUE}, selector={"mode": "markers"})
        figure.update_traces(line={"color": RED}, selector={"mode": "lines"})
        last = max(trial.number for trial in self.scored)
        return self._styled(figure, 380).update_xaxes(dtick=1 if last < 10 else None)  # no ticks between trials

    def slice(self, name: str) -> Any:
        """Return the score by one parameter."""
        figure = plot_slice(self._study, params=[plot_text(name)], target_name=LABELS[self.metric])
        figure.update_traces(marker={"colorscale": SCALE, "showscale": False, "line": {"width": 0}})
        figure = self._styled(figure, 280).update_xaxes(title={"text": ""})
        if hasattr(self._spaces[name], "choices"):
            choices = self._spaces[name].choices
            figure.update_xaxes(range=[-0.5, len(choices) - 0.5])  # else the outer ones are at the edges
            return figure.update_xaxes(labelalias={repr(each): each for each in choices})
        values = [value for trial in self.scored if (value := _value(trial, name)) is not None]
        few = {*values}
        if len(few) <= FEW and len(few) < len(values):  # else ticks of draws, some close together
            figure.update_xaxes(tickvals=list(few), ticktext=[value_text(value) for value in few])
        return figure

    def parallel(self) -> Any:
        """Return parallel coordinates of the parameters that all trials have."""
        study = self._with(self.scored[:MOST_LINES])
        names = [plot_text(name) for name in self.shared]
        figure = plot_parallel_coordinate(study, params=names, target_name=LABELS[self.metric])
        figure.for_each_trace(self._recolour)
        figure = self._styled(figure, 460).update_layout(margin={"l": 20, "r": 20, "t": 20, "b": 60})
        figure.update_annotations(font={"color": None})
        whole = [LABELS[self.metric], *sorted(names)]  # Optuna cuts them, in this order
        shown = [
            on_lines(name if name.startswith(text.removesuffix("...")) else text, 16)
            for name, text in zip(whole, figure.layout.xaxis.ticktext or whole, strict=True)
        ]
        return figure.update_xaxes(ticktext=shown, range=[-0.5, len(self.shared) + 0.3], tickangle=0)

    @staticmethod
    def _recolour(trace: Any) -> None:
        """Colour a line of parallel coordinates by the score, its first axis, which is scale enough. Optuna 4 has one
        trace of all lines."""
        if trace.type == "parcoords":
            trace.line.colorscale = SCALE
        elif trace.mode == "lines":
            trace.line.color = sample_colorscale(SCALE, [trace.y[0]])[0]
        else:
            trace.marker.showscale = False

    def importances(self) -> Any | None:
        """Return fANOVA's importance of the parameters that all trials have, for the rank of the score: so one that
        diverged does not hide the others. None for few trials, or if scores or parameters are all alike."""
        scores = sorted({trial.score for trial in self.scored if trial.score is not None})
        if len(self.scored) < LEAST_TRIALS or len(scores) < 2 or not self.shared:
            return None
        every = -(-len(self.scored) // MOST_WEIGHED)
        figure = plot_param_importances(
            self._with(self.scored[::every]),
            evaluator=FanovaImportanceEvaluator(seed=0),
            params=[plot_text(name) for name in self.shared],
            target=lambda trial: float(scores.index(trial.value)),
            target_name="the rank of the score",
        )
        figure.update_traces(marker={"color": BLUE})
        figure = self._styled(figure, 110 + 28 * len(self.shared)).update_yaxes(title={"text": ""})
        return figure.update_xaxes(title={"text": "share of variance"}, range=[0, 1.15])

    def edf(self) -> Any:
        """Return the share of trials that are at most as good as a score."""
        figure = plot_edf(self._study, target_name=LABELS[self.metric])
        figure.update_traces(line={"color": BLUE}, showlegend=False)
        return self._styled(figure, 300)

    def curves(self) -> Any:
        """Return the learning curves of the best trials."""
        figure = plot_intermediate_values(self._with(self.scored[:MOST_LINES]))
        figure.update_traces(marker={"size": 4}, line={"width": 1.2})
        figure = self._styled(figure, 380).update_layout(showlegend=False)
        last = max((point.epoch for trial in self.scored for point in trial.curve), default=1)
        figure.update_xaxes(title={"text": "epoch"}, dtick=-(-last // 8))  # ticks at whole epochs
        return figure.update_yaxes(title={"text": LABELS[self.metric]})

    def _with(self, complete: Sequence[Trial]) -> Any:
        """Return a study in which these trials are complete."""
        study = create_study(study_name="trials", direction=direction(self.metric))
        chosen = {trial.number for trial in complete}
        for trial in self._trials:
            if trial.number not in chosen:
                study.add_trial(create_trial(state=TrialState.FAIL))
                continue
            own = {name: v for name in self.varying if (v := _value(trial, name)) is not None}
            curve = {point.epoch: value for point in trial.curve if can_draw(value := point.value(self.metric))}
            study.add_trial(
                create_trial(
                    value=trial.score,
                    params={plot_text(name): _as_in(self._spaces[name], value) for name, value in own.items()},
                    distributions={plot_text(name): self._spaces[name] for name in own},
                    intermediate_values=curve,
                )
            )
        return study

    def _styled(self, figure: Any, height: int) -> Any:
        """Return Optuna's figure without its title, of the page's height."""
        margin = {"l": 8, "r": 12, "t": 8, "b": 8}
        return figure.update_layout(title={"text": ""}, height=height, plot_bgcolor=None, margin=margin)


def _value(trial: Trial, name: str) -> Value | None:
    """Return a trial's value of a parameter; None if it has none, or a number that no axis can show."""
    value = trial.params.get(name)
    return value if isinstance(value, bool | str) or can_draw(value) else None


def _distribution(values: Sequence[Value]) -> Any:
    """Return Optuna's distribution of a parameter's values: numbers, by their logarithms where they span much, or
    categories."""
    if any(isinstance(value, bool | str) for value in values):
        return CategoricalDistribution(sorted({plot_text(value_text(value)) for value in values}))
    numbers = [float(value) for value in values]
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=low > 0 and high / low >= LOG_SPAN)


def _as_in(space: Any, value: Value) -> Any:
    """Return a value as its distribution has it."""
    return plot_text(value_text(value)) if hasattr(space, "choices") else float(value)
