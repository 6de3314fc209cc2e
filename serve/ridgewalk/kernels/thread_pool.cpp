// The pool's entry points for Python.
#include "thread_pool.h"

using namespace ridgewalk;

extern "C" {

void* rw_pool_create(int threads) { return new ThreadPool(threads); }

void rw_pool_destroy(void* pool) { delete (ThreadPool*)pool; }

}
