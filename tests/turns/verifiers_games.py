"""Environments of verifiers for the tests, loaded by the name of this module."""

from typing import Any


def load_environment(kind: str = "echo", size: int = 3) -> Any:
    """Return an environment: `echo` answers twice with the length of a turn, `tools` has a tool."""
    import verifiers as vf
    from datasets import Dataset

    rows = Dataset.from_list([{"question": f"say {n}", "answer": str(n)} for n in range(size)])

    async def right(completion: Any, answer: str) -> float:
        return float(completion[-1]["content"] == answer)

    def double(x: int) -> str:
        """Double a number.

        Args:
            x: The number.
        """
        if x < 0:
            raise ValueError("negative")
        return str(2 * x)

    class Echo(vf.MultiTurnEnv):
        async def setup_state(self, state: Any) -> Any:
            state["left"] = 2
            return state

        async def env_response(self, messages: Any, state: Any, **given: Any) -> Any:
            state["left"] -= 1
            if messages[-1]["content"] == "break":
                raise vf.Error("broken")
            return [{"role": "user", "content": f"{len(messages[-1]['content'])} letters"}]

        @vf.stop
        async def is_over(self, state: Any) -> bool:
            return state.get("left", 1) == 0 and len(state["trajectory"]) == 3

    rubric = vf.Rubric(funcs=[right], weights=[2.0])
    if kind == "tools":
        return vf.ToolEnv(tools=[double], dataset=rows, rubric=rubric, system_prompt="Use the tool.", max_turns=3)
    return Echo(dataset=rows, eval_dataset=rows, rubric=rubric)
