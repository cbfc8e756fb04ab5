"""An asker with given answers, and small data sets written by hand."""

from __future__ import annotations

import contextlib
from pathlib import Path

from PIL import Image

from vtoken.eval.benchmarks.example_data import write_mme, write_videomme
from vtoken.eval.running.asker import Reply


class Canned:
    """Answers by the question that a prompt contains; reads `budget` of 100 tokens. Counts what it was asked."""

    def __init__(self, answers: dict[str, str], refuses: str = "") -> None:
        self.answers, self.refuses = answers, refuses
        self.prompts, self.batches, self.budget = [], [], 1.0

    @contextlib.contextmanager
    def applied(self, strategy, budget=1.0):
        self.budget = budget
        yield

    def refusal(self, strategy, budget, prompt):
        return "no thank you" if strategy and strategy == self.refuses else ""

    def __call__(self, prompts, max_new_tokens):
        self.prompts += prompts
        self.batches.append(len(prompts))
        return [self.reply(p) for p in prompts]

    def reply(self, prompt) -> Reply:
        (text,) = (answer for question, answer in self.answers.items() if question in prompt.text)
        return Reply(text, 100 * self.budget, 100.0, 10 * self.budget, 10.0, 0.25, 0.5)


# question: (image, category, right answer, what the model says)
MME_ROWS = {
    "Is a dog here?": ("e1.png", "existence", "Yes", "Yes"),
    "Is a cat here?": ("e1.png", "existence", "No", "No, there is none."),
    "Is a cow here?": ("e2.png", "existence", "Yes", "It is: yes"),
    "Is a fox here?": ("e2.png", "existence", "No", "Not at all"),
    "Is it Python?": ("c1.png", "code_reasoning", "Yes", "yes or no"),
    "Is it Perl?": ("c1.png", "code_reasoning", "No", "n"),
}
MME_SAID = {question: row[3] for question, row in MME_ROWS.items()}


def mme_rows(question: str = "{} Please answer yes or no.") -> list[dict]:
    picture = Image.new("RGB", (16, 12), "teal")
    return [
        {
            "question_id": f"{category}/{image}",
            "image": picture,
            "question": question.format(text),
            "answer": answer,
            "category": category,
        }
        for text, (image, category, answer, _) in MME_ROWS.items()
    ]


def mme_folder(path: Path) -> Path:
    return write_mme(path / "mme", mme_rows())


OPTIONS = ["A. Ant.", "B. Bee.", "C. Cat.", "D. Dog."]
# question: (videoID, duration, task type, right answer, what the model says)
VIDEO_ROWS = {
    "What crawls?": ("one", "short", "Object Recognition", "A", "A"),
    "What flies?": ("one", "short", "Action Recognition", "B", "Best answer: B"),
    "What purrs?": ("two", "medium", "Object Recognition", "C", "Best answer: C"),
    "What barks?": ("two", "medium", "Action Recognition", "D", "The answer is (D)."),
    "What hums?": ("two", "long", "Object Recognition", "B", "The answer is B. Dogs do not"),
}
VIDEO_SAID = {question: row[4] for question, row in VIDEO_ROWS.items()}
SRT = """1
00:00:00,000 --> 00:00:01,000
<font color="white" size=".72c">first words</font>

2
00:00:01,000 --> 00:00:02,000
<font color="white" size=".72c">second words</font>

3
00:00:01,500 --> 00:00:02,000
plain words
"""


def grey(value: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3)


def video_rows() -> list[dict]:
    return [
        {
            "video_id": "001",
            "duration": duration,
            "domain": "Knowledge",
            "sub_category": "Law",
            "url": "https://example.org",
            "videoID": video,
            "question_id": f"001-{i}",
            "task_type": task,
            "question": question,
            "options": OPTIONS,
            "answer": answer,
        }
        for i, (question, (video, duration, task, answer, _)) in enumerate(VIDEO_ROWS.items())
    ]


def video_folder(path: Path) -> Path:
    """Two clips of 16 frames at 8 per second, each frame 15 levels brighter than the last; "one" has
    subtitles.
    """
    clips = {name: [grey(15 * i) for i in range(16)] for name in ("one", "two")}
    return write_videomme(path / "videomme", video_rows(), clips, fps=8, said={"one": SRT})
