"""One file per benchmark (questions, parsing of answers, score), and the readers of their data sets."""
