// Loaded into llama-server by LD_PRELOAD: once the file KVMERGE_TEST_SIGNAL exists, the thread that decodes sends SIGTERM to
// itself right after it has taken a lock. That thread is the first one, and while nothing is asked it takes one lock only: that
// of the queue of tasks, which stopping takes too.

#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

static atomic_flag sent = ATOMIC_FLAG_INIT;

int pthread_mutex_lock(pthread_mutex_t * mutex) {
    static int (*lock)(pthread_mutex_t *) = NULL;
    if (!lock) {
        lock = (int (*)(pthread_mutex_t *)) dlsym(RTLD_NEXT, "pthread_mutex_lock");
    }

    const int result = lock(mutex);

    const int before = errno;

    const char * file = getenv("KVMERGE_TEST_SIGNAL");
    if (file && gettid() == getpid() && access(file, F_OK) == 0 && !atomic_flag_test_and_set(&sent)) {
        pthread_kill(pthread_self(), SIGTERM);
    }

    errno = before; // a lock changes nothing of it

    return result;
}
