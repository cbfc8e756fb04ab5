"""One file per benchmark, with its questions, its parsing of answers and its score; and the data sets they
read.
"""
