"""Chat with a saved model: python launch/chat.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("chat")
