"""Pictures of a search: what is believed of every choice, what trying is worth, what was tried, and the path taken.

Workers against memory as maps; where memory has one value, as on this machine, curves over the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smlt.client.optimizer.goals import Goal
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.space import Choice, Space
from smlt.client.report.belief import Moment, Story
from smlt.client.report.forecasts import SHADOW_PRICE
from smlt.client.report.pictures import (
    BLUE,
    FAINT,
    GREEN,
    MAP,
    PURPLE,
    RED,
    TEXT,
    UNSURE_MAP,
    Picture,
    Table,
    legend,
    new_figure,
    number_text,
    seconds_text,
    usd_text,
    whole_numbers,
)
from smlt.client.report.steps import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

    from smlt.client.optimizer.optimizer import Landscape

#: Of a normal distribution, 5 % lie beyond so many standard deviations on either side.
BAND = 1.645
TICKS_MAX = 9
BEST_ROWS = 5
_TWO_SIDED = "PuOr_r"  # orange and purple are told apart by every kind of colour-blindness


def search_pictures(story: Story) -> list[Picture]:
    """What is believed at last, and how that came. Call it within `drawing()`."""
    flat = len(story.space.memory_mb) == 1
    return [_curves(story) if flat else _maps(story), _came(story, _came_curve if flat else _came_map)]


def objective_name(goal: Goal) -> str:
    """What the goal wants least of."""
    if goal.deadline_s is not None:
        return "cost of the run, USD"
    return "time of the run, s" if goal.budget_usd is not None else "time x cost, s USD"


def _maps(story: Story) -> Picture:
    """What a run would be with each choice, as believed at last; a map for each thing."""
    from matplotlib.colors import LogNorm, Normalize

    moment = story.whole
    believed = moment.landscape
    learnt = 100 * (believed.step_s / story.predicted - 1)
    kept = story.goal.deadline_s is not None or story.goal.budget_usd is not None
    maps: list[tuple[str, Array, str, Normalize]] = [
        ("median step time, s", believed.step_s, MAP, LogNorm()),
        ("uncertainty: 90 % within ± %", 100 * (np.exp(BAND * believed.std_log) - 1), UNSURE_MAP, Normalize()),
        ("time of a run, s", believed.seconds, MAP, LogNorm()),
        (f"{objective_name(story.goal)}: % above the least", _above_least(believed), MAP, Normalize(0, 100)),
        ("learnt: slower than the model said, %", learnt, _TWO_SIDED, _around_zero(learnt)),
        ("odds that the goal is kept, %", 100 * believed.odds, UNSURE_MAP, Normalize(0, 100))
        if kept
        else ("cost of a run, USD", believed.usd, MAP, LogNorm()),
    ]
    figure, all_axes = new_figure(8.6, 3, 2)
    for axes, (title, values, colours, norm) in zip(all_axes, maps, strict=True):
        _map(axes, story.space, values, title, colours, norm)
        _points(axes, story, moment)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    caption = f"{_WHOLE} {_READ} Hatched: choices that cannot work."
    return Picture("belief", "What is believed", _alt(story, moment), figure, caption + _price(story), _best(story, moment))


def _above_least(believed: Landscape) -> Array:
    """By how many per cent each choice's objective is above the least one."""
    known = believed.objective[np.isfinite(believed.objective)]
    least = float(known.min()) if known.size else 1.0
    return 100 * (believed.objective / least - 1)


_WHOLE = "A run from beginning to end with one choice, as believed with all that was observed."
_READ = (
    "White dots: what was tried, numbered in order, the larger the oftener; the line: the path taken; the star: where it is."
)


def _map(axes: Axes, space: Space, values: Array, title: str, colours: str, norm: Normalize) -> None:
    """One value for each choice; workers to the right, memory upward, a square each."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FormatStrFormatter

    shown = np.ma.masked_invalid(values.T)
    clipped = bool(shown.count() and norm.vmax is not None and shown.max() > norm.vmax)
    _hatch_what_cannot_work(axes)
    image = axes.imshow(shown, origin="lower", aspect="auto", cmap=colours, norm=norm)
    plain = "%g" if isinstance(norm, LogNorm) else None
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, extend="max" if clipped else "neither", format=plain)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    bar.ax.tick_params(which="both", labelsize=7.5)
    axes.grid(visible=False)
    axes.set_title(title, fontsize=8.5)
    for set_ticks, sizes, set_label, label in (
        (axes.set_xticks, space.workers, axes.set_xlabel, "workers"),
        (axes.set_yticks, space.memory_mb, axes.set_ylabel, "MB"),
    ):
        at = sorted({round(i) for i in np.linspace(0, len(sizes) - 1, min(TICKS_MAX, len(sizes)))})
        set_ticks(at, [f"{sizes[i]}" for i in at], fontsize=7.5)
        set_label(label, labelpad=1.5)


def _hatch_what_cannot_work(axes: Axes) -> None:
    """What shows through where there is no value: white is a value, too."""
    axes.patch.set(hatch="////", edgecolor=FAINT, linewidth=0)


def _points(axes: Axes, story: Story, moment: Moment) -> None:
    """What was tried up to there, the path, where it is and where it goes."""
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=2.4, foreground="black")]
    tried = story.observations[: moment.observed]
    order = list(dict.fromkeys(one.choice for one in tried))
    spots = [_spot(story.space, choice) for choice in order]
    path = _path_so_far(story, moment)
    if len(path) > 1:
        x, y = np.array([_spot(story.space, choice) for choice in path]).T
        axes.plot(x, y, color="white", linewidth=1.1, path_effects=outline, label="path taken")
    if spots:
        times = [sum(one.choice == choice for one in tried) for choice in order]
        x, y = np.array(spots).T
        axes.scatter(
            x, y, s=[48 + 10 * min(count, 9) for count in times], c="white", edgecolors="black", label="tried", zorder=3
        )
    for position, (x_at, y_at) in enumerate(spots):
        axes.annotate(str(position + 1), (x_at, y_at), ha="center", va="center", fontsize=6, color="black", zorder=6)
    if moment.current is not None:
        x_at, y_at = _spot(story.space, moment.current)
        axes.plot(
            [x_at],
            [y_at + _LIFT],
            "*",
            color="#ffd400",
            markersize=9,
            markeredgecolor="black",
            label="now",
            zorder=5,
            clip_on=False,
        )
    if moment.chosen is not None and moment.chosen != moment.current:
        x_at, y_at = _spot(story.space, moment.chosen)
        axes.plot([x_at], [y_at], "D", color="none", markersize=10, markeredgecolor="white", path_effects=outline, label="next")


_LIFT = 0.55  # of a square: the star beside the number


def _path_so_far(story: Story, moment: Moment) -> list[Choice]:
    """Up to a moment: as far as its observations go."""
    if moment is story.whole or moment is story.moments[-1]:
        return list(story.path)
    seen = [one.choice for one in story.observations[: moment.observed]]
    return [choice for i, choice in enumerate(seen) if not i or seen[i - 1] != choice]


def _spot(space: Space, choice: Choice) -> tuple[float, float]:
    """Where a choice is on a map; between two squares when it is none of the grid's (another number by `smlt scale`)."""
    return (
        float(np.interp(choice.workers, space.workers, range(len(space.workers)))),
        float(np.interp(choice.memory_mb, space.memory_mb, range(len(space.memory_mb)))),
    )


def _around_zero(values: Array) -> Normalize:
    """The same colour for zero, and both sides as far as the positive one goes; what is worth less than that looks alike."""
    from matplotlib.colors import Normalize

    known = values[np.isfinite(values)]
    most = float(np.abs(known).max()) if known.size else 1.0
    gain = float(known.max()) if known.size else 0.0
    reach = gain if gain > 1e-6 * most else most  # nothing is ever quite without a gain
    return Normalize(-(reach or 1.0), reach or 1.0)


def _curves(story: Story) -> Picture:
    """The same where only the number of workers is to be chosen."""
    moment = story.whole
    figure, (step_axes, objective_axes) = new_figure(5.4, 2, sharex=True, height_ratios=(3, 2))
    workers = np.array(story.space.workers)
    _band(step_axes, workers, moment.landscape)
    step_axes.plot(workers, story.predicted[:, 0] * 1e3, color=FAINT, linestyle="--", label="cost model alone")
    _tried(step_axes, story.observations, moment.global_batch_size)
    step_axes.set_ylabel("step time, ms")
    objective_axes.plot(workers, moment.landscape.objective[:, 0], color=GREEN, marker="o")
    objective_axes.set_ylim(0, None)
    objective_axes.set_ylabel(objective_name(story.goal).replace(", ", ",\n"))
    if story.goal.deadline_s is not None or story.goal.budget_usd is not None:
        odds = objective_axes.twinx()
        odds.plot(
            workers, 100 * moment.landscape.odds[:, 0], color=PURPLE, linestyle=":", label="odds that the goal is kept, %"
        )
        odds.set_ylim(-5, 105)
        odds.grid(visible=False)
        odds.set_ylabel("odds, %")
        legend(odds)
    objective_axes.set_xlabel("workers")
    for axes in (step_axes, objective_axes):
        _mark(axes, moment)
    legend(step_axes)
    caption = f"{_WHOLE} Bands hold 90 %; numbers: the order in which workers were tried."
    return Picture("belief", "What is believed", _alt(story, moment), figure, caption + _price(story), _best(story, moment))


def _band(axes: Axes, workers: Array, believed: Landscape) -> None:
    middle, spread = believed.step_s[:, 0] * 1e3, np.exp(BAND * believed.std_log[:, 0])
    axes.fill_between(workers, middle / spread, middle * spread, color=BLUE, alpha=0.22, linewidth=0, label="90 % band")
    axes.plot(workers, middle, color=BLUE, label="believed", marker="o" if workers.size < 20 else None)
    axes.set_ylim(0, 1.25 * float(np.nanmax(np.minimum(middle * spread, 3 * np.nanmax(middle)))))
    whole_numbers(axes.xaxis)


def _tried(axes: Axes, tried: Sequence[Observation], global_batch_size: int) -> None:
    """Observed step times with their 90 % errors; of another global batch they are hollow."""
    for same in (True, False):
        points = [one for one in tried if (one.global_batch_size == global_batch_size) == same]
        if points:
            x, y = [one.choice.workers for one in points], np.array([one.step_s for one in points]) * 1e3
            errors = BAND * np.array([one.noise for one in points]) * y
            look: dict[str, Any] = {
                "color": TEXT,
                "markersize": 4,
                "alpha": 0.8 if len(points) <= 30 else 0.25,
                "markerfacecolor": TEXT if same else "none",
                "linewidth": 1,
            }
            axes.errorbar(x, y, errors, fmt="s", label="observed" if same else "observed, another batch", zorder=4, **look)
    for position, choice in enumerate(dict.fromkeys(one.choice for one in tried)):
        highest = max(one.step_s for one in tried if one.choice == choice) * 1e3
        axes.annotate(
            str(position + 1), (choice.workers, highest), (3, 5), textcoords="offset points", fontsize=8, fontweight="bold"
        )


def _gain(axes: Axes, workers: Array, believed: Landscape) -> None:
    values = believed.acquisition[:, 0]
    width = 0.8 * float(np.diff(workers).min()) if workers.size > 1 else 0.8
    axes.bar(workers, values, width=width, color=[GREEN if value > 0 else FAINT for value in values], alpha=0.8)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    norm = _around_zero(values)
    assert norm.vmin is not None
    assert norm.vmax is not None
    axes.set_ylim(1.15 * norm.vmin, 1.15 * norm.vmax)
    axes.set_ylabel("gain less\nprice of trying")


def _mark(axes: Axes, moment: Moment) -> None:
    if moment.current is not None:
        axes.axvline(moment.current.workers, color=RED, linewidth=1.0, linestyle="-.", label="now")
    if moment.chosen is not None and moment.chosen != moment.current:
        axes.axvline(moment.chosen.workers, color=RED, linewidth=1.0, linestyle=":", label="next")


def _came(story: Story, draw: Callable[[Story, Moment, Axes, Axes], None]) -> Picture:
    """How the belief came: a column for each moment, what is believed above what trying is worth."""
    count = len(story.moments)
    figure, axes = new_figure(4.6, 2, count)
    for column, moment in enumerate(story.moments):
        draw(story, moment, axes[column], axes[count + column])
        axes[column].set_title(moment.title, fontsize=8)
        axes[count + column].set_title("gain less price", fontsize=8)
        if column:
            axes[column].set_ylabel("")
            axes[count + column].set_ylabel("")
    titles = ", ".join(moment.title for moment in story.moments)
    alt = f"The belief and the acquisition at {count} moments: {titles}; " + "; ".join(
        f"{moment.title}: best believed {_best_choice(moment)}" for moment in story.moments
    )
    rows = tuple(
        (
            moment.title,
            str(moment.observed),
            str(moment.current or "none"),
            str(_best_choice(moment)),
            str(moment.chosen or "?"),
        )
        for moment in story.moments
    )
    table = Table(("moment", "rounds seen", "at", "best believed", "chosen"), rows)
    flat = len(story.space.memory_mb) == 1
    what, marks = ("step time", _LINES) if flat else (f"{objective_name(story.goal)}, the darker the less", _MARKS)
    caption = f"Above: {what}; below, the acquisition: what a round of each choice promises beyond what it costs. {marks}"
    return Picture("belief-history", "How the belief came", alt + ".", figure, caption, table)


_LINES = "Lines: dash-dotted where training was, dotted where it went on."
_MARKS = "Star: where training was; diamond: where it went on. Orange is worth trying, purple and white are not."


def _came_map(story: Story, moment: Moment, above: Axes, below: Axes) -> None:
    from matplotlib.colors import LogNorm

    believed = moment.landscape
    for axes, values, colours, norm in (
        (above, believed.objective, MAP, LogNorm()),
        (below, believed.acquisition, _TWO_SIDED, _around_zero(believed.acquisition)),
    ):
        _hatch_what_cannot_work(axes)
        axes.imshow(np.ma.masked_invalid(values.T), origin="lower", aspect="auto", cmap=colours, norm=norm)
        axes.grid(visible=False)
        for set_ticks, sizes in ((axes.set_xticks, story.space.workers), (axes.set_yticks, story.space.memory_mb)):
            at = sorted({0, len(sizes) // 2, len(sizes) - 1})
            set_ticks(at, [f"{sizes[i]}" for i in at], fontsize=7)
        _points(axes, story, moment)
    above.set_ylabel("MB")
    below.set_ylabel("MB")
    below.set_xlabel("workers")


def _came_curve(story: Story, moment: Moment, above: Axes, below: Axes) -> None:
    workers = np.array(story.space.workers)
    _band(above, workers, moment.landscape)
    _tried(above, story.observations[: moment.observed], moment.global_batch_size)
    above.set_ylabel("step time, ms")
    _gain(below, workers, moment.landscape)
    below.set_xlabel("workers")
    for axes in (above, below):
        axes.tick_params(labelsize=7)
        _mark(axes, moment)


def _best_choice(moment: Moment) -> Choice | None:
    """Of the choices that keep the goal as likely as not, the one with the least objective."""
    ranked = _ranked(moment)
    return ranked[0] if ranked else None


def _ranked(moment: Moment) -> list[Choice]:
    believed = moment.landscape
    found = []
    for i, workers in enumerate(believed.space.workers):
        for j, memory_mb in enumerate(believed.space.memory_mb):
            if np.isfinite(believed.objective[i, j]):
                kept = believed.odds[i, j]
                # where none is sure, those that are nearly as likely as the likeliest come first
                unlikely = max(0.0, min(0.95, float(np.nanmax(believed.odds)) - 0.02) - kept)
                found.append(((unlikely > 0, unlikely, float(believed.objective[i, j])), Choice(workers, memory_mb)))
    return [choice for _, choice in sorted(found)]


def _best(story: Story, moment: Moment) -> Table:
    """The best choices, and those that were tried."""
    believed, space = moment.landscape, story.space
    ranked = _ranked(moment)
    tried = list(dict.fromkeys(one.choice for one in story.observations[: moment.observed]))
    shown = list(dict.fromkeys([*ranked[:BEST_ROWS], *tried, *([moment.current] if moment.current else [])]))[:24]
    rows = []
    for choice in shown:
        if choice not in ranked:
            continue
        at = space.workers.index(choice.workers), space.memory_mb.index(choice.memory_mb)
        within = np.exp(BAND * believed.std_log[at]) - 1
        rows.append(
            (
                f"{choice}" + (" (now)" if choice == moment.current else ""),
                str(ranked.index(choice) + 1),
                str(tried.index(choice) + 1) if choice in tried else "",
                f"{seconds_text(float(believed.step_s[at]))} ± {within:.0%}",
                seconds_text(float(believed.seconds[at])),
                usd_text(float(believed.usd[at])),
                f"{believed.odds[at]:.0%}",
                number_text(float(believed.acquisition[at]), 3),
            )
        )
    header = ("choice", "rank", "tried as", "step time (90 %)", "time in all", "cost in all", "odds", "gain less price")
    return Table(header, tuple(rows))


def _alt(story: Story, moment: Moment) -> str:
    best, tried = _best_choice(moment), len({one.choice for one in story.observations[: moment.observed]})
    kind = "Curves over the number of workers" if len(story.space.memory_mb) == 1 else "Maps over workers and memory"
    path = ", ".join(map(str, story.path[:12])) + (", …" if len(story.path) > 12 else "")
    return (
        f"{kind}, {len(story.space)} choices, {tried} of them tried: step time, its uncertainty, objective and acquisition. "
        f"Believed best: {best or 'none'}; now at {moment.current or 'none'}. Path: {path}."
    )


def _price(story: Story) -> str:
    return "" if story.on_lambda else f" {SHADOW_PRICE}"
