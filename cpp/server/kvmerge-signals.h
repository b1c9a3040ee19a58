#pragma once

// How a signal ends llama-server.
//
// To stop, it takes the lock of its queue of tasks. A handler that does this itself waits for ever where the thread that it
// interrupts holds that lock. Here the handler only writes a byte, and a thread reads it and stops the server. Nobody answers
// requests from then on, so those that wait for an answer have to be told.

#include <functional>
#include <thread>

struct kvmerge_signals {
    // stop: ends the server, called with the signal by a thread that holds no lock
    explicit kvmerge_signals(std::function<void(int)> stop);
    ~kvmerge_signals();

    kvmerge_signals(const kvmerge_signals &) = delete;

private:
    std::thread thread;
};

// For the handler of a signal, while there is a kvmerge_signals.
void kvmerge_signal(int signal);

// Whether one has come.
bool kvmerge_is_stopping();
