"""How evaluation harnesses ask yes-or-no and multiple-choice questions, and how they read the answers."""
