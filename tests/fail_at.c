// Loaded into llama-server by LD_PRELOAD: at SIGUSR1 it reads a number from the file KVMERGE_TEST_FAIL_AT, lets that step of
// the engine fail (kvmerge_fail_at), and writes how many steps there were since the last time.

#define _GNU_SOURCE

#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

static void arm(int signal_number) {
    (void) signal_number;

    void (*fail_at)(int) = (void (*)(int)) dlsym(RTLD_DEFAULT, "kvmerge_fail_at");
    int (*count)(void)   = (int (*)(void)) dlsym(RTLD_DEFAULT, "kvmerge_fail_count");

    FILE * file = fopen(getenv("KVMERGE_TEST_FAIL_AT"), "r+");

    int n = 0;
    if (!fail_at || !count || !file || fscanf(file, "%d", &n) != 1) {
        abort();
    }

    rewind(file);
    fprintf(file, "steps %d\n", count());
    fail_at(n);
    fclose(file);
}

__attribute__((constructor)) static void begin(void) {
    signal(SIGUSR1, arm);
}
