"""Messages: a question -> system prompt, worked example and question."""

from grpo.config.schema import DataConfig
from grpo.types import Message

SYSTEM_PROMPT = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""

EXAMPLE_QUESTION = "A box holds 6 pencils. Nina buys 4 boxes and gives 5 pencils away. How many pencils are left?"
EXAMPLE_REASONING = "4 boxes hold 4 * 6 = 24 pencils. After giving away 5, 24 - 5 = 19 are left."
EXAMPLE_ANSWER = "19"


def messages_for(question: str, data: DataConfig) -> list[Message]:
    """Return the messages for one question, with data.system_prompt and data.one_shot."""
    messages: list[Message] = []
    xml = data.system_prompt == "xml"
    if data.system_prompt:
        messages.append({"role": "system", "content": SYSTEM_PROMPT if xml else data.system_prompt})
    if data.one_shot:
        shown = f"<reasoning>\n{EXAMPLE_REASONING}\n</reasoning>\n<answer>\n{EXAMPLE_ANSWER}\n</answer>\n"
        # The example uses the tags only if the system prompt has introduced them.
        content = shown if xml else f"{EXAMPLE_REASONING}\n{EXAMPLE_ANSWER}"
        messages.append({"role": "user", "content": EXAMPLE_QUESTION})
        messages.append({"role": "assistant", "content": content})
    messages.append({"role": "user", "content": question})
    return messages
