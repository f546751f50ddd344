"""Several turns around any engine: a round samples one turn of every completion, from its whole context.

    round 1   prompt ->                      turn 1
    round 2   prompt + turn 1 + given ->     turn 2          only of completions that something follows

The engine gets each context as a prompt of its own, so a server with a prefix cache computes only what is new. The
random numbers of a turn depend on (seed, draw, sample, turn). All completions of a round are waited for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grpo.rollout.dialogue import Dialogue, Turns
from grpo.rollout.engine import RolloutEngine
from grpo.rollout.sampling import stream_key
from grpo.types import Completion, Group, Prompt, SamplingPlan


class TurnRounds(RolloutEngine):
    """Engine that samples several turns with another one, turn by turn.

    Args:
        engine: the engine.
        turns: what follows a turn.
    """

    def __init__(self, engine: RolloutEngine, turns: Turns):
        self.engine, self.turns = engine, turns
        self.has_own_weights = engine.has_own_weights  # type: ignore[misc]

    def generate(
        self, prompts: list[Prompt], plan: SamplingPlan, finished: Callable[[Group], None] | None = None
    ) -> list[Group]:
        """See RolloutEngine. Groups are finished together, after the last round."""
        samples = plan.num_generations
        prompts = self.turns.begin(prompts, samples)
        first = self.engine.generate(prompts, plan)
        self.prefilled_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        done: dict[tuple[int, int], Completion] = {}
        rows = [
            _Row(p, s, completion, self.turns.dialogue(prompts[p], p, s, samples))
            for p, group in enumerate(first)
            for s, completion in enumerate(group.completions)
        ]
        rounds = 1
        while rows:
            waiting = [row for row in rows if row.dialogue.end_turn(row.tokens, row.ended)]
            going = [row for row in waiting if row.go_on(plan.max_completion_length)]
            for row in rows:
                if row not in going:
                    done[row.prompt, row.sample] = row.dialogue.completion(row.tokens, row.logprobs, row.ended)
            contexts = [row.context(prompts[row.prompt], rounds) for row in going]
            self.prefilled_tokens += sum(len(context.token_ids) for context in contexts)
            if going:
                left = max(plan.max_completion_length - len(row.tokens) for row in going)
                one = replace(plan, num_generations=1, max_completion_length=left)
                for row, group in zip(going, self.engine.generate(contexts, one), strict=True):
                    row.add(group.completions[0], plan.max_completion_length)
            rows, rounds = going, rounds + 1
        groups = [Group(prompt, [done[p, s] for s in range(samples)]) for p, prompt in enumerate(prompts)]
        for group in groups if finished is not None else []:
            finished(group)  # type: ignore[misc]
        return groups

    def description(self) -> str:
        return self.engine.description()

    def state_dict(self) -> dict[str, int]:
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.engine.load_state_dict(state)

    def free_memory(self) -> None:
        self.engine.free_memory()

    def update_weights(self, step: int) -> None:
        self.engine.update_weights(step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class _Row:
    """One completion."""

    def __init__(self, prompt: int, sample: int, first: Completion, dialogue: Dialogue):
        self.prompt, self.sample, self.dialogue = prompt, sample, dialogue
        self.tokens, self.logprobs, self.ended = [*first.token_ids], [*first.logprobs], first.ended

    def go_on(self, longest: int) -> bool:
        """Add what follows the turn. False: the completion ends here."""
        given = self.dialogue.continuation(self.tokens, longest)
        self.tokens += given
        self.logprobs += [0.0] * len(given)
        return bool(given)

    def context(self, prompt: Prompt, turn: int) -> Prompt:
        """Return everything so far as a prompt with random numbers of its own."""
        return replace(
            prompt,
            draw=stream_key(turn, prompt.draw, self.sample) >> 1,
            token_ids=(*prompt.token_ids, *self.tokens),
        )

    def add(self, turn: Completion, longest: int) -> None:
        """Add a turn, cut off at `longest` tokens of the completion."""
        left = longest - len(self.tokens)
        self.tokens += turn.token_ids[:left]
        self.logprobs += turn.logprobs[:left]
        self.ended = turn.ended and len(turn.token_ids) <= left


def with_turns(engine: RolloutEngine, turns: Turns | None) -> RolloutEngine:
    """Return an engine that samples several turns: `engine` itself if it can, or one around it."""
    if turns is None:
        return engine
    if engine.answers_turns:
        engine.turns = turns
        return engine
    return TurnRounds(engine, turns)
