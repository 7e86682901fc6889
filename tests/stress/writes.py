"""The same as writes.c, in Python: threads write known values, and mappings come and go."""

import ctypes
import mmap
import os
import random
import sys
import threading

PAGE, PAGES, THREADS = 4096, 4096, 4
each = int(sys.argv[1])
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
memory = mmap.mmap(-1, PAGES * PAGE, private)
memory[:] = b"\1" * len(memory)
marks = mmap.mmap(3, PAGES)
begin, end = threading.Barrier(THREADS + 1), threading.Barrier(THREADS + 1)


def writer(number):
    chance, value, words = random.Random(number), 0, memoryview(memory).cast("Q")
    while True:
        begin.wait()
        for _ in range(each):
            page = (chance.randrange(PAGES // 8) + value // each * 97) % PAGES
            value += 1
            words[page * PAGE // 8 + number * 64 + value % 64] = value
            marks[page] = 1
        end.wait()


for number in range(THREADS):
    threading.Thread(target=writer, args=(number,), daemon=True).start()
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
held, chance = {}, random.Random(99)
for round_, line in enumerate(sys.stdin):
    begin.wait()
    for _ in range(4):
        k = chance.randrange(8)
        if k not in held:
            held[k] = mmap.mmap(-1, chance.randrange(1, 128) * PAGE, private)
        elif chance.randrange(3):
            held[k].resize(chance.randrange(1, 256) * PAGE)
        else:
            held.pop(k).close()
            continue
        for at in range(chance.randrange(7) * PAGE, len(held[k]), 7 * PAGE):
            held[k][at + chance.randrange(PAGE)] = chance.randrange(256)
    if line.startswith("exec"):
        os.execv(sys.executable, [sys.executable, "-W", "ignore", *sys.argv])
    end.wait()
    if round_ % 8 == 0:
        child = os.fork()
        if not child:
            memory[:] = b"\2" * len(memory)
            if round_ % 16 == 0:
                os.execv("/bin/true", ["true"])
            os._exit(0)
        os.waitpid(child, 0)
    print("over", flush=True)
