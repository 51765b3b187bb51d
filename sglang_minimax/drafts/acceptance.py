"""Whether a draft's tokens are accepted often enough, for drafts that nobody vouches for.

A draft of another model, or one that reads the wrong layers, gives right replies, slowly. What
gives it away is how many tokens a verified step is worth: one from the model, and the accepted ones
of the draft. No torch, no SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

#: How often a draft should be right, token by token. 0.57 to 0.84 are published for drafts of this
#: family (MiniMax-M3-EAGLE3, greedy); a draft of another model is right by accident only.
RIGHT = 0.4
#: Verifications before anything is said, one for each request in each step. One yields 1 to 5
#: tokens or so, with a standard deviation of about one, so that the mean over 200 is known to 0.07.
ENOUGH = 200


def expected_length(num_steps: int, right: float = RIGHT) -> float:
    """Tokens of a verified step when each of a chain of `num_steps` is right with that probability.

    1 + p + p^2 + ...: the model's own token, and the draft's up to the first wrong one.

    >>> round(expected_length(3), 3)
    1.624
    """
    return sum(right**step for step in range(num_steps + 1))


@dataclass(slots=True)
class Watch:
    """Hears the totals of a server now and then, and has one sentence for a low accepted length.

    num_steps: draft tokens in a chain, SGLang's --speculative-num-steps.
    """

    num_steps: int
    done: bool = False

    def heard(self, verified: int, tokens: int) -> str | None:
        """The sentence, once, when `verified` verifications yielded too few `tokens`.

        Totals since the start, or since a reset: each request counts once in each step, and the
        model's own token is among those that it gets.
        """
        least = expected_length(self.num_steps)
        if self.done or verified < ENOUGH or tokens >= least * verified:
            return None
        self.done = True
        return (
            f"the accepted length is {tokens / verified:.2f} tokens over {verified} verifications "
            f"(one for each request and step), below {least:.2f}, which a draft has that is right "
            f"for {RIGHT:.0%} of its tokens; check that it was trained for this model and such "
            "requests, and names the layers that it was trained on, or start without "
            "--speculative-algorithm."
        )
