// What cuda.cpp offers to c10d.cpp.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>

// NCCL over this process's current GPU. Its communicator is made with the first collective, which meets the peers through the store.
c10::intrusive_ptr<c10d::Backend> everlit_nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                               std::chrono::milliseconds timeout);
