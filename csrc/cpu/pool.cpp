#include "cpu/pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace rvqa {
namespace {

struct Job {
    int64_t N, grain;
    void (*work)(void*, int64_t, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;

    void help() noexcept {
        for (;;) {
            const int64_t begin = next.fetch_add(grain);
            if (begin >= N || failed) return;
            try {
                work(context, begin, std::min(begin + grain, N));
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();
            }
        }
    }
};

class Pool {
  public:
    // Returns false if another thread's job runs.
    bool run(Job& job, int helpers) {
        const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
        if (!alone.owns_lock()) return false;
        for (; started_ < helpers; ++started_) std::thread(&Pool::serve, this).detach();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            tickets_ = helpers;
        }
        wake_.notify_all();
        job.help();
        std::unique_lock<std::mutex> lock(mutex_);
        tickets_ = 0;  // threads that have not begun need not start
        done_.wait(lock, [&] { return active_ == 0; });
        return true;
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return tickets_ > 0; });
            --tickets_;
            ++active_;
            Job* job = job_;
            lock.unlock();
            job->help();
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_;   // held by the caller whose job runs; guards started_
    int started_ = 0;
    std::mutex mutex_;  // guards the members below
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int tickets_ = 0, active_ = 0;
};

// The pool is never freed, because its threads wait in it until the process ends.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    Pool* here = current.load();
    if (here) return *here;
#if defined(__unix__) || defined(__APPLE__)
    // A forked child has none of the threads, so it starts with a new pool.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    (void)registered;
#endif
    Pool* made = new Pool;
    if (current.compare_exchange_strong(here, made)) return *made;
    delete made;
    return *here;
}

}  // namespace

void parallel(int64_t N, int64_t grain, int threads, void (*work)(void*, int64_t, int64_t), void* context) {
    if (N <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    const int64_t parts = (N + grain - 1) / grain;
    const int helpers = int(std::min<int64_t>(threads, parts)) - 1;
    Job job;
    job.N = N, job.grain = grain, job.work = work, job.context = context;
    if (helpers < 1 || !pool().run(job, helpers)) job.help();
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace rvqa
