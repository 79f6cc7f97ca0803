"""Records which names a process looks up and which sockets of the internet it opens, libraries in C++ included.

A library that is loaded before all others takes the place of the three functions. It looks nothing up itself, so a test
needs no network and troubles nobody.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

static void record(const char *what, const char *which) {
    FILE *log = fopen(getenv("NETWORK_LOG"), "a");
    if (log) { fprintf(log, "%s %s\n", what, which ? which : ""); fclose(log); }
}
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    record("getaddrinfo", node);
    return EAI_FAIL;
}
int socket(int domain, int type, int protocol) {
    int (*real)(int, int, int) = dlsym(RTLD_NEXT, "socket");
    if (domain == AF_INET || domain == AF_INET6) record("socket", "");
    return real(domain, type, protocol);
}
int connect(int descriptor, const struct sockaddr *address, socklen_t length) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    if (address->sa_family != AF_INET && address->sa_family != AF_INET6) return real(descriptor, address, length);
    record("connect", "");
    errno = ENETUNREACH;
    return -1;
}
"""


def compile_recorder(folder: Path) -> Path | None:
    """The library to name in LD_PRELOAD; it appends to the file that NETWORK_LOG names. None without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "network.so"
    (folder / "network.c").write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "network.c", "-ldl"], check=True)
    return library
