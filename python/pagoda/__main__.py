"""`python -m pagoda`: the program itself."""

import os
import sys

from pagoda._command import environment, find_pagoda

if __name__ == "__main__":
    program = find_pagoda()
    os.execve(program, [program, *sys.argv[1:]], environment())
