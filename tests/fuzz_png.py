"""Damages PNG files at random and opens them: each must be read, or refused in one line, in little time and memory.

    python tests/fuzz_png.py 20000 [SEED]
"""

import io
import random
import resource
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from PIL import Image, ImageCms, PngImagePlugin

from images import open_image, read_parameters

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT = "a cat\nNegative prompt: b\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 8x8, Model: \"a, b\""


def seeds():
    """Returns small PNG files of every kind, each a list of (chunk name, data)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = []
    for mode in ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]:
        for compressed in [False, True]:
            info = PngImagePlugin.PngInfo()
            info.add_text("parameters", TEXT, zip=compressed)
            info.add_itxt("parameters", TEXT + "猫", zip=compressed)
            file = io.BytesIO()
            Image.new(mode, (9, 7)).save(file, "PNG", pnginfo=info, exif=exif, icc_profile=profile,
                                         transparency=1 if mode in ("L", "P", "I;16") else None)
            files.append(split(file.getvalue()))
    file = io.BytesIO()
    Image.new("RGB", (9, 7)).save(file, "PNG", save_all=True, append_images=[Image.new("RGB", (9, 7), "red")] * 2)
    return [*files, split(file.getvalue())]


def split(data):
    chunks, at = [], len(SIGNATURE)
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at:at + 8])
        chunks.append((name, data[at + 8:at + 8 + length]))
        at += length + 12
    return chunks


def join(chunks):
    return SIGNATURE + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
                                for name, data in chunks)


def bomb(rng):
    """Returns a chunk that is small in the file and large in memory."""
    packed = zlib.compress(bytes(rng.choice([2**20, 2**22, 2**24, 2**27])), 9)
    return rng.choice([(b"iCCP", b"p\0\0" + packed), (b"zTXt", b"parameters\0\0" + packed), (b"IDAT", packed),
                       (b"iTXt", b"parameters\0\1\0\0\0" + packed), (b"eXIf", packed), (b"fdAT", packed)])


def scramble(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:
            data[at:at + 1] = bytes([rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])])
        else:
            data[at:at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
    return bytes(data)


def damage(rng, chunks):
    """Returns the bytes of a damaged file: chunks changed under a valid checksum, or bytes of the whole file."""
    chunks = list(chunks)
    for _ in range(rng.choice([1, 1, 2, 4])):
        k = rng.randrange(len(chunks))
        name, data = chunks[k]
        match rng.randrange(6):
            case 0 | 1:
                chunks[k] = name, scramble(rng, data)
            case 2:
                chunks.insert(rng.randrange(len(chunks) + 1), chunks.pop(k))
            case 3:
                chunks[k:k + 1] = [chunks[k]] * rng.choice([0, 2, 50])
            case 4:
                chunks[k] = rng.choice([b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"IDAT"]), data
            case 5:
                chunks.insert(rng.randrange(1, len(chunks) + 1), bomb(rng) if rng.random() < 0.1 else (name, data))
        chunks = chunks or [(b"IHDR", b"")]
    file = join(chunks)
    match rng.randrange(6):
        case 0:
            return scramble(rng, file)
        case 1:
            return file[:rng.randrange(len(file))]
    return file


def run(count, seed=0):
    """Opens so many damaged files; returns how many were read, the longest time (s) and the growth of memory (MB)."""
    rng, files, n_read, longest = random.Random(seed), seeds(), 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(count):
        file = damage(rng, rng.choice(files))
        start = time.perf_counter()
        for read in (open_image, read_parameters):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(io.BytesIO(file))
                n_read += read is open_image
            except ValueError as error:
                assert str(error).startswith("input_image: ") and "\n" not in str(error), f"file {k}: {error}"
        longest = max(longest, time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return n_read, longest, (after - before) / 1024


if __name__ == "__main__":
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    n_read, longest, growth = run(count, seed)
    print(f"{count} files: {n_read} read, {count - n_read} refused; at most {longest:.2f} s a file, {growth:.0f} MB more")
