#include "kvmerge-signals.h"

#include <atomic>
#include <stdexcept>
#include <utility>

static std::atomic<bool> is_stopping = false;

bool kvmerge_is_stopping() {
    return is_stopping;
}

#ifdef _WIN32

// Windows calls handlers in a thread of their own already.
static std::function<void(int)> on_signal;

kvmerge_signals::kvmerge_signals(std::function<void(int)> stop) {
    on_signal = std::move(stop);
}

kvmerge_signals::~kvmerge_signals() {
    on_signal = nullptr;
}

void kvmerge_signal(int signal) {
    if (on_signal) {
        is_stopping = true;
        on_signal(signal);
    }
}

#else

#include <cerrno>
#include <csignal>
#include <fcntl.h>
#include <unistd.h>

static int ends[2] = { -1, -1 }; // of a pipe: the thread reads from the first, the handler writes to the second

// only what a handler may call
static void send(char byte) {
    const int before = errno;
    while (write(ends[1], &byte, 1) < 0 && errno == EINTR) {
    }
    errno = before;
}

kvmerge_signals::kvmerge_signals(std::function<void(int)> stop) {
    if (pipe(ends) != 0) {
        throw std::runtime_error("no pipe for signals: too many files are open");
    }
    for (const int end : ends) {
        fcntl(end, F_SETFD, FD_CLOEXEC); // not for the programs that it starts
    }

    thread = std::thread([stop = std::move(stop)]() {
        char byte = 0;
        ssize_t n = 0;
        while ((n = read(ends[0], &byte, 1)) < 0 && errno == EINTR) {
        }
        if (n == 1 && byte != 0) {
            is_stopping = true;
            stop(byte);
        }
    });
}

kvmerge_signals::~kvmerge_signals() {
    send(0);
    thread.join();
    // A signal may still come: the ends stay open, as its handler may be about to write.
}

void kvmerge_signal(int signal) {
    send((char) signal);
}

#endif
