// Stand-in for a gloo header that the torch wheel does not ship: only what an abort needs, exported by libtorch_cpu.
// Contexts are only held in a shared_ptr that libtorch made, never sized or destroyed here.
#pragma once

#include <chrono>
#include <exception>
#include <memory>
#include <string>

namespace gloo {
namespace transport {
class Pair {
 public:
  virtual ~Pair() = 0;
};
namespace tcp {
class Pair {
 public:
  std::exception_ptr signalExceptionExternal(const std::string& message);
};
}
}

class Context {
 public:
  std::unique_ptr<transport::Pair>& getPair(int rank);
  void setTimeout(std::chrono::milliseconds timeout);
};
}
