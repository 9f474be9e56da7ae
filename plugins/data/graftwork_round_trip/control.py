"""Wrong answers, whose affirmation tells that a writer's yes means nothing."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwork_round_trip.asking import AFFIRMED, ASKED, Asked, Replies

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass
class Control:
    """What was asked that is wrong: by each, about whose answer, whose answer or images took the place of its own, and the reply."""

    of: NDArray[Any]
    by: NDArray[Any]
    is_moved: NDArray[Any]
    """Whether the answer was asked about the other's images, and not the other's answer about its own."""
    replies: Replies = field(default_factory=Replies)

    @property
    def answers(self) -> NDArray[Any]:
        """Which answers were asked about."""
        import numpy as np

        return np.where(self.is_moved, self.of, self.by)


def wrong_answers(asked: Asked, seed: int, least: int) -> Control:
    """For each answer of the affirmed records, in their order, another affirmed record of the same group with an answer that says
    something else.

    One to the same question is preferred, whose answer is then asked about. An answer to another question would be denied by
    whoever sees that it fits none, so there the own question and answer are asked about the other images. In groups of fewer than `least` answers each has several, until there are as many or
    nothing else was said.
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    records, hashes, questions = (np.array(each, np.int64) for each in (asked.records, asked.hashes, asked.questions))
    groups = np.array(asked.groups, np.int64)[records]
    chosen = np.flatnonzero(affirmed_records(asked)[records])
    by = np.full(len(records), -1)
    for blocks in (np.stack([groups, questions]), groups[None]):
        drawn = _drawn_of_others(blocks[:, chosen], hashes[chosen], draw)
        by[chosen] = np.where((by[chosen] < 0) & (drawn >= 0), chosen[drawn], by[chosen])
    of_extra, by_extra = array("q"), array("q")
    for group in np.unique(groups[chosen]):
        members = chosen[groups[chosen] == group]
        times = math.ceil(least / len(members))
        for answer in members if times > 1 else ():
            others = draw.permutation(members)
            others = others[np.argsort(questions[others] != questions[answer], kind="stable")]
            found: dict[int, int] = {}
            for other in others:
                found.setdefault(int(hashes[other]), int(other))
            more = [other for key, other in found.items() if key not in (hashes[answer], hashes[by[answer]])]
            by_extra.extend(more[: times - 1])
            of_extra.extend([int(answer)] * len(more[: times - 1]))
    with_any = chosen[by[chosen] >= 0]
    of = np.concatenate([with_any, np.array(of_extra, np.int64)])
    order = np.argsort(of, kind="stable")
    of, by = of[order], np.concatenate([by[with_any], np.array(by_extra, np.int64)])[order]
    images = np.array(asked.images, np.int64)[records]
    return Control(of, by, (questions[of] != questions[by]) & (images[of] != images[by]))


def _drawn_of_others(blocks: NDArray[Any], answers: NDArray[Any], draw: Any) -> NDArray[Any]:
    """For each place one of the same block, the columns of `blocks`, that has another answer, drawn; -1 where there is none."""
    import numpy as np

    if not len(answers):
        return np.zeros(0, np.int64)
    order = np.lexsort((answers, *blocks[::-1]))
    keys = np.concatenate([blocks, answers[None]])[:, order]
    new_block = np.concatenate([[True], (keys[:-1, 1:] != keys[:-1, :-1]).any(0)])
    new_answer = np.concatenate([[True], (keys[:, 1:] != keys[:, :-1]).any(0)])
    (first, end), (own, own_end) = _bounds(new_block), _bounds(new_answer)
    others = (end - first) - (own_end - own)
    place = first + (draw.random(len(order)) * others).astype(np.int64)
    place = np.where(place >= own, place + own_end - own, place)
    drawn = np.empty(len(order), np.int64)
    drawn[order] = np.where(others > 0, order[np.minimum(place, len(order) - 1)], -1)
    return drawn


def _bounds(begins: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """For each place, where the stretch that it lies in begins and ends, of where new ones begin."""
    import numpy as np

    starts = np.append(np.flatnonzero(begins), len(begins))
    which = np.cumsum(begins) - 1
    return starts[which], starts[which + 1]


def affirmed_records(asked: Asked) -> NDArray[Any]:
    """By record, whether all its answers were affirmed, and it has one."""
    import numpy as np

    affirmed: NDArray[Any] = np.array(asked.fates, np.uint8) == ASKED
    said = np.array(asked.replies.said, np.uint8)
    affirmed[np.array(asked.records, np.int64)[said != AFFIRMED]] = False
    return affirmed
