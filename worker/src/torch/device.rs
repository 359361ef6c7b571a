//! Where tensors live: the processor, or one GPU of those granted to the job; and reading a GPU's memory beside the step.
//!
//! A rank takes the GPU of its local number, counted around when ranks are more. The trap: a GPU's work is only queued when a call
//! returns; what went wrong in it shows at the next wait.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;

use everlit_api::job::Device as Asked;
use tch::{Cuda, Device, Tensor};

use super::TrainError;
use super::c10d::{CollectiveError, check};
use super::environment::Environment;
use super::memory::Memory;

/// Whether this build can use GPUs at all.
pub const HAS_CUDA: bool = cfg!(feature = "nccl");

unsafe extern "C" {
    fn everlit_deterministic() -> c_int;
    fn everlit_cuda_select(index: c_int) -> c_int;
    fn everlit_cuda_memory(free: *mut usize, total: *mut usize) -> c_int;
    fn everlit_cuda_name(into: *mut c_void, got: extern "C" fn(*mut c_void, *const c_char)) -> c_int;
    fn everlit_cuda_pin(start: *mut c_void, bytes: usize) -> c_int;
    fn everlit_cuda_unpin(start: *mut c_void) -> c_int;
    fn everlit_cuda_reader_new(out: *mut *mut c_void) -> c_int;
    fn everlit_cuda_reader_free(reader: *mut c_void);
    fn everlit_cuda_reader_mark(reader: *mut c_void) -> c_int;
    fn everlit_cuda_reader_begin(reader: *mut c_void) -> c_int;
    fn everlit_cuda_reader_read(reader: *mut c_void, device: *const c_void, host: *mut c_void, bytes: usize) -> c_int;
    fn everlit_cuda_reader_wait(reader: *mut c_void) -> c_int;
}

/// Variables that libtorch reads when it first needs them. Before any thread is started.
pub fn prepare_environment(deterministic: bool) {
    let unset = |name: &str| std::env::var_os(name).is_none_or(|value| value.is_empty());
    let set = |name: &str, value: &str| {
        // SAFETY: the process has one thread so far.
        unsafe { std::env::set_var(name, value) }
    };
    // A failed collective frees its communicator and leaves this process alone: who ends or meets again is decided here.
    set("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2");
    // No other thread ends the process for what it takes to be a hang; the agent's deadlines do.
    if unset("TORCH_NCCL_ENABLE_MONITORING") {
        set("TORCH_NCCL_ENABLE_MONITORING", "0");
    }
    // Without it matrix products on a GPU may differ between runs, and libtorch refuses them.
    if deterministic && unset("CUBLAS_WORKSPACE_CONFIG") {
        set("CUBLAS_WORKSPACE_CONFIG", ":4096:8");
    }
}

/// The device that a job asks for, made ready.
pub fn choose(asked: Asked, deterministic: bool, environment: &Environment) -> Result<Device, TrainError> {
    let visible = if asked == Asked::Cpu { 0 } else { count() };
    match (asked, visible) {
        (Asked::Cpu, _) | (Asked::Auto, 0) => return Ok(Device::Cpu),
        (Asked::Cuda, 0) if !HAS_CUDA => {
            return Err(TrainError::Config(
                "device is cuda, but this build of everlit-worker has no CUDA: use cpu or auto, or build with scripts/build.sh --cuda"
                    .into(),
            ));
        }
        (Asked::Cuda, 0) => {
            let granted = std::env::var("CUDA_VISIBLE_DEVICES").map_or("not set".into(), |list| format!("`{list}`"));
            return Err(TrainError::Failed(format!(
                "device is cuda, but no GPU can be used here: see nvidia-smi (CUDA_VISIBLE_DEVICES is {granted})"
            )));
        }
        _ => {}
    }
    let index = environment.local_rank % visible;
    // SAFETY: plain numbers.
    check(unsafe { everlit_cuda_select(c_int::try_from(index).unwrap_or(0)) })?;
    if deterministic {
        // SAFETY: sets switches of libtorch.
        check(unsafe { everlit_deterministic() })?;
    }
    Ok(Device::Cuda(index as usize))
}

/// GPUs that this process sees.
pub fn count() -> u32 {
    if HAS_CUDA { u32::try_from(Cuda::device_count()).unwrap_or(0) } else { 0 }
}

/// The name of this process's GPU.
pub fn name() -> Result<String, CollectiveError> {
    extern "C" fn got(into: *mut c_void, name: *const c_char) {
        // SAFETY: the string below, and a NUL-terminated text.
        unsafe { into.cast::<String>().write(CStr::from_ptr(name).to_string_lossy().into_owned()) }
    }
    let mut name = String::new();
    // SAFETY: `got` is called within the call, once.
    check(unsafe { everlit_cuda_name((&raw mut name).cast(), got) })?;
    Ok(name)
}

/// Memory of this process's GPU.
pub fn memory() -> Result<Memory, CollectiveError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: two numbers to write.
    check(unsafe { everlit_cuda_memory(&mut free, &mut total) })?;
    Ok(Memory { total: total as u64, free: free as u64 })
}

/// Waits for everything that is queued; on the processor nothing is.
pub fn finish(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// Copies a GPU's memory into the machine's, beside whatever the GPU computes. Two threads share it: one marks, one reads.
#[derive(Debug)]
pub struct Reader {
    raw: *mut c_void,
}

// SAFETY: a stream and an event of CUDA's, which may be used from any thread.
unsafe impl Send for Reader {}
// SAFETY: as above.
unsafe impl Sync for Reader {}

impl Reader {
    /// For tensors like this one; `None` when they are not on a GPU.
    pub fn of(tensor: &Tensor) -> Result<Option<Arc<Self>>, CollectiveError> {
        if !tensor.device().is_cuda() {
            return Ok(None);
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: a pointer to write.
        check(unsafe { everlit_cuda_reader_new(&mut raw) })?;
        Ok(Some(Arc::new(Self { raw })))
    }

    /// The next [`Reader::read`] sees what this thread has queued by now.
    pub fn mark(&self) -> Result<(), CollectiveError> {
        // SAFETY: `raw` is valid while `self` is.
        check(unsafe { everlit_cuda_reader_mark(self.raw) })
    }

    /// Copies `pieces` (address on the GPU, target), and waits for them.
    ///
    /// # Safety
    /// Each address has as many bytes as its target, of a live tensor that nothing queued after the mark writes to.
    pub unsafe fn read<'a>(&self, pieces: impl Iterator<Item = (usize, &'a mut [u8])>) -> Result<(), CollectiveError> {
        // SAFETY: `raw` is valid while `self` is.
        check(unsafe { everlit_cuda_reader_begin(self.raw) })?;
        let queued = pieces.into_iter().try_for_each(|(address, target)| {
            // SAFETY: by the caller; the targets outlive the wait below.
            check(unsafe { everlit_cuda_reader_read(self.raw, address as *const c_void, target.as_mut_ptr().cast(), target.len()) })
        });
        // SAFETY: as above. What was queued is waited for in any case.
        let waited = check(unsafe { everlit_cuda_reader_wait(self.raw) });
        queued.and(waited)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // SAFETY: made by `everlit_cuda_reader_new`, freed once.
        unsafe { everlit_cuda_reader_free(self.raw) }
    }
}

/// Memory that a GPU can write to on its own while this lives. Where it can not be had, copies are slower and no less right.
#[derive(Debug)]
pub struct Pinned(*mut c_void);

impl Pinned {
    /// # Safety
    /// The memory outlives the answer.
    pub unsafe fn new(memory: &mut [u8]) -> Option<Self> {
        let start = memory.as_mut_ptr().cast();
        // SAFETY: by the caller.
        let pinned = !memory.is_empty() && unsafe { everlit_cuda_pin(start, memory.len()) } == 0;
        pinned.then_some(Self(start))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: pinned by `new`, unpinned once. A failure leaves it pinned until the process ends.
        let _ = unsafe { everlit_cuda_unpin(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_auto_is_the_processor_and_cuda_is_refused() {
        let alone = Environment::read(|_| None).unwrap();
        if count() > 0 {
            return;
        }
        assert_eq!(choose(Asked::Auto, false, &alone).unwrap(), Device::Cpu);
        assert_eq!(choose(Asked::Cpu, true, &alone).unwrap(), Device::Cpu);
        let code = choose(Asked::Cuda, false, &alone).unwrap_err().exit_code();
        assert_eq!(code, if HAS_CUDA { 1 } else { 78 });
    }
}
