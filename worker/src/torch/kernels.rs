//! Rust's side of `cpp/kernels.cpp`, `cpp/attention.cpp` and `cpp/memory.cpp`: fused parts of a layer, and memory that is kept between steps.

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
    fn everlit_attention(
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

/// Causal attention over `[samples, positions, features]` that hold queries, keys and values, the first two turned by `cos` and `sin` of
/// `[positions, head]`; heads of a multiple of 32 features. Answers `[samples, positions, heads * head]`. Float32 on the CPU.
pub fn attention(joined: &Tensor, cos: &Tensor, sin: &Tensor, heads: i64, kv_heads: i64) -> Result<Tensor, CollectiveError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: as in `rms_norm`.
    unsafe {
        check(everlit_attention(pointer(joined), pointer(cos), pointer(sin), heads, kv_heads, &mut out))?;
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

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// Runs both on the same numbers and compares answers and gradients.
    fn same(what: &str, inputs: &[Tensor], ours: impl Fn(&[Tensor]) -> Tensor, plain: impl Fn(&[Tensor]) -> Tensor) {
        let run = |build: &dyn Fn(&[Tensor]) -> Tensor| {
            let own: Vec<Tensor> = inputs.iter().map(|input| input.copy().set_requires_grad(true)).collect();
            let answer = build(&own);
            let weights = Tensor::arange(answer.numel() as i64, (Kind::Float, Device::Cpu)).sin().view_as(&answer);
            (&answer * weights).sum(Kind::Float).backward();
            std::iter::once(answer.detach()).chain(own.iter().map(Tensor::grad)).collect::<Vec<_>>()
        };
        for (number, (a, b)) in run(&ours).iter().zip(run(&plain)).enumerate() {
            let apart = (a - &b).norm().double_value(&[]) / b.norm().double_value(&[]);
            assert!(apart < 2e-6, "{what}, tensor {number}: {apart:e} apart");
        }
    }

    fn random(shape: &[i64]) -> Tensor {
        let count: i64 = shape.iter().product();
        let stream = crate::torch::random::Stream::new(9, "kernels");
        let numbers: Vec<f32> = (0..count as u64).map(|position| stream.normal(position)).collect();
        Tensor::from_slice(&numbers).view(shape)
    }

    #[test]
    fn fused_parts_equal_libtorch_s_own() {
        for dim in [16, 40, 128] {
            let inputs = [random(&[5, 33, dim]), random(&[dim]) + 1.0];
            same("norm", &inputs, |t| rms_norm(&t[0], &t[1], 1e-5).unwrap(), |t| t[0].rms_norm(dim, Some(&t[1]), 1e-5));
            let both = [random(&[7, 70, 2 * dim]) * 4.0];
            let plain = |t: &[Tensor]| t[0].narrow(-1, 0, dim).silu() * t[0].narrow(-1, dim, dim);
            same("swiglu", &both, |t| swiglu(&t[0]).unwrap(), plain);
        }
    }

    #[test]
    fn attention_equals_libtorch_s_own_for_any_length() {
        for (samples, length, query, key, head) in [(2, 7, 4, 2, 32), (1, 130, 2, 1, 64), (3, 64, 3, 3, 32), (1, 1, 1, 1, 96)] {
            let angles = Tensor::arange(length, (Kind::Float, Device::Cpu)).unsqueeze(1)
                * Tensor::arange(head / 2, (Kind::Float, Device::Cpu)).unsqueeze(0)
                * 0.1;
            let cos = Tensor::cat(&[angles.cos(), angles.cos()], 1);
            let sin = Tensor::cat(&[-angles.sin(), angles.sin()], 1);
            let inputs = [random(&[samples, length, (query + 2 * key) * head])];
            let plain = |t: &[Tensor]| {
                let part =
                    |from: i64, count: i64| t[0].narrow(-1, from * head, count * head).view([samples, length, count, head]).transpose(1, 2);
                let turned = |x: Tensor| &x * &cos + x.roll(head / 2, -1) * &sin;
                let (q, k, v) = (turned(part(0, query)), turned(part(query, key)), part(query + key, key));
                let mixed = Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, None, query != key);
                mixed.transpose(1, 2).reshape([samples, length, query * head])
            };
            same("attention", &inputs, |t| attention(&t[0], &cos, &sin, query, key).unwrap(), plain);
            let split = |t: &[Tensor]| {
                let [q, k, v] = heads(&t[0], &cos, &sin, query, key).unwrap();
                let mixed = Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, None, query != key);
                mixed.transpose(1, 2).reshape([samples, length, query * head])
            };
            same("heads", &inputs, split, plain);
        }
    }
}
