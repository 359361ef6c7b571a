"""Text to tokens: one shard in, one file of numbers out (16 bits each, or 32 where the vocabulary needs it, little-endian).

Alone: `python tokenize_text.py in.txt out.bin`. Over all shards of a bucket:

    {"kind": "preprocess", "world_size": 8, "data": {"shards": ["s3://bucket/text/*.txt"], "to": "s3://bucket/tokens"},
     "command": ["python3", "tokenize_text.py", "{input}", "{output}.bin"]}

Without `--tokenizer` a token is a byte, and 256 ends each document; documents are parted by empty lines. With it, a `tokenizer.json` of the
`tokenizers` package says what a token is.
"""

import argparse
import array
import sys

END_OF_DOCUMENT = 256


def documents(path):
    """The documents of a file, as bytes; one is in memory at a time."""
    lines = []
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield b"".join(lines)
                lines = []
    if lines:
        yield b"".join(lines)


def by_bytes():
    return lambda document: [*document, END_OF_DOCUMENT], END_OF_DOCUMENT + 1


def by_tokenizer(path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    return lambda document: tokenizer.encode(document.decode("utf-8", errors="replace")).ids, tokenizer.get_vocab_size()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--tokenizer", help="a tokenizer.json; without it a token is a byte")
    options = parser.parse_args()
    encode, vocabulary = by_tokenizer(options.tokenizer) if options.tokenizer else by_bytes()
    code = "H" if vocabulary <= 1 << 16 else "I"
    count = 0
    with open(options.output, "wb") as file:
        for document in documents(options.input):
            tokens = array.array(code, encode(document))
            if sys.byteorder == "big":
                tokens.byteswap()
            tokens.tofile(file)
            count += len(tokens)
    print(f"{count} tokens of {8 * array.array(code).itemsize} bits from {options.input}")


if __name__ == "__main__":
    main()
