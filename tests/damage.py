"""Damage done to files."""



def flip(path, at=1_001):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def append(path):
    with open(path, "ab") as file:
        file.write(b"\0" * 4)
