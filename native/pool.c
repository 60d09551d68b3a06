/* The pool: workers that start when they are first needed, and sleep while there is no work. */
#include "pool.h"

#include <pthread.h>
#include <signal.h>

#define MAX_WORKERS (MAX_THREADS - 1)

/* One call of pool_run, on its caller's stack: no worker may touch it once the caller has taken it
 * off the list and num_active is zero. */
typedef struct Job {
    void (*work)(void *, Py_ssize_t);
    void *context;
    Py_ssize_t count, next; /* the next index is taken without the mutex */
    Py_ssize_t num_free;    /* places that no worker has taken */
    int num_active;         /* workers that compute */
    struct Job *following;
} Job;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* of all below, and of jobs */
static pthread_cond_t has_work = PTHREAD_COND_INITIALIZER;
static pthread_cond_t is_left = PTHREAD_COND_INITIALIZER; /* a job, by its last worker */
static Job *jobs;
static Py_ssize_t num_workers;

static void compute(Job *job) {
    for (;;) {
        Py_ssize_t index = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (index >= job->count) return;
        job->work(job->context, index);
    }
}

static int is_open(const Job *job) {
    return job->num_free && __atomic_load_n(&job->next, __ATOMIC_RELAXED) < job->count;
}

static void *serve(void *unused) {
    (void)unused;
    pthread_mutex_lock(&mutex);
    for (;;) {
        Job *job = jobs;
        while (job && !is_open(job)) job = job->following;
        if (!job) {
            pthread_cond_wait(&has_work, &mutex);
            continue;
        }
        job->num_free--;
        job->num_active++;
        pthread_mutex_unlock(&mutex);
        compute(job);
        pthread_mutex_lock(&mutex);
        if (!--job->num_active) pthread_cond_broadcast(&is_left);
    }
    return NULL;
}

/* Forget what a fork has not copied: the workers, and the threads that were in pool_run. */
static void forget(void) {
    pthread_mutex_init(&mutex, NULL);
    pthread_cond_init(&has_work, NULL);
    pthread_cond_init(&is_left, NULL);
    jobs = NULL;
    num_workers = 0;
}

static void forget_after_fork(void) { pthread_atfork(NULL, NULL, forget); }

/* Start workers until there are `wanted`, or no more can be had. The mutex is held. */
static void start_workers(Py_ssize_t wanted) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (num_workers >= wanted) return;
    pthread_once(&once, forget_after_fork);
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    /* Signals are for the interpreter's threads, except those that a fault raises in its own. */
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGILL);
    sigdelset(&all, SIGFPE);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    while (num_workers < wanted && !pthread_create(&thread, &attributes, serve, NULL))
        num_workers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

void pool_run(void (*work)(void *context, Py_ssize_t index), void *context, Py_ssize_t count,
              Py_ssize_t threads) {
    Py_ssize_t others = (threads < count ? threads : count) - 1;
    if (others > MAX_WORKERS) others = MAX_WORKERS;
    Job job = {.work = work, .context = context, .count = count, .num_free = others};
    if (others < 1) {
        compute(&job);
        return;
    }
    pthread_mutex_lock(&mutex);
    start_workers(others);
    job.following = jobs;
    jobs = &job;
    pthread_mutex_unlock(&mutex);
    for (Py_ssize_t i = 0; i < others; i++) pthread_cond_signal(&has_work);
    compute(&job);
    pthread_mutex_lock(&mutex);
    Job **place = &jobs;
    while (*place != &job) place = &(*place)->following;
    *place = job.following;
    while (job.num_active) pthread_cond_wait(&is_left, &mutex);
    pthread_mutex_unlock(&mutex);
}
