// What the files of this folder have in common: errors as codes, and tensors behind plain pointers.
#pragma once

#include <ATen/ATen.h>

#include <string>

std::string& everlit_last_error();

template <typename Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& error) {
    everlit_last_error() = error.what_without_backtrace();
  } catch (const std::exception& error) {
    everlit_last_error() = error.what();
  } catch (...) {
    everlit_last_error() = "unknown C++ exception";
  }
  return 1;
}

inline const at::Tensor& tensor(const void* pointer) { return *static_cast<const at::Tensor*>(pointer); }
