//! Rust's side of `cpp/kernels.cpp` and `cpp/memory.cpp`: fused parts of a layer, and memory that is kept between steps.

use std::ffi::{c_int, c_void};

use tch::Tensor;

use super::c10d::{CollectiveError, check};

unsafe extern "C" {
    fn everlit_rms_norm(x: *const c_void, weight: *const c_void, epsilon: f64, out: *mut *mut c_void) -> c_int;
    fn everlit_swiglu(both: *const c_void, out: *mut *mut c_void) -> c_int;
    fn everlit_heads(
        joined: *const c_void,
        cos: *const c_void,
        sin: *const c_void,
        heads: i64,
        kv_heads: i64,
        out: *mut *mut c_void,
    ) -> c_int;
    fn everlit_keep_memory();
}

/// Large blocks of tensors are kept and used again from now on; called once, before the first tensor.
pub fn keep_memory() {
    // SAFETY: registers an allocator that is never destroyed.
    unsafe { everlit_keep_memory() }
}

fn pointer(tensor: &Tensor) -> *const c_void {
    tensor.as_ptr().cast()
}

/// Takes over a new tensor.
///
/// # Safety
/// `raw` is a tensor that nobody else owns.
unsafe fn owned(raw: *mut c_void) -> Tensor {
    // SAFETY: by the caller.
    unsafe { Tensor::from_ptr(raw.cast()) }
}

/// Each row scaled to a mean square of one, times the weight. Float32 on the CPU.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor, CollectiveError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: valid tensors; a new one comes back unless it is an error.
    unsafe {
        check(everlit_rms_norm(pointer(x), pointer(weight), epsilon, &mut out))?;
        Ok(owned(out))
    }
}

/// `silu(first half) * second half` of the last dimension. Float32 on the CPU.
pub fn swiglu(both: &Tensor) -> Result<Tensor, CollectiveError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: as in `rms_norm`.
    unsafe {
        check(everlit_swiglu(pointer(both), &mut out))?;
        Ok(owned(out))
    }
}

/// Queries, keys and values out of `[samples, positions, features]`, the first two turned by `cos` and `sin` of `[positions, head]`.
pub fn heads(joined: &Tensor, cos: &Tensor, sin: &Tensor, heads: i64, kv_heads: i64) -> Result<[Tensor; 3], CollectiveError> {
    let mut out = [std::ptr::null_mut(); 3];
    // SAFETY: as in `rms_norm`, three times.
    unsafe {
        check(everlit_heads(pointer(joined), pointer(cos), pointer(sin), heads, kv_heads, out.as_mut_ptr()))?;
        Ok(out.map(|raw| owned(raw)))
    }
}
