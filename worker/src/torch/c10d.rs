//! Rust's side of `cpp/c10d.cpp`: process group, reducer and optimizer as owned values.
//!
//! Refuses to know what is trained. The trap: a collective blocks its thread until every rank joins, the group's
//! timeout passes, or another thread calls [`Group::abort`]; after any error the group is unusable and must be dropped.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

use tch::Tensor;

use super::rendezvous::Rendezvous;

/// What libtorch said, first line only.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct CollectiveError(pub String);

impl CollectiveError {
    /// From a message that may carry a C++ stack behind its first line.
    pub fn from_message(message: &str) -> Self {
        let line = message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("unknown error");
        Self(line.chars().take(300).collect())
    }

    /// Whether a rank of the group is gone or does not answer, as far as their words tell.
    pub fn is_peer_lost(&self) -> bool {
        let text = self.0.to_lowercase();
        ["gloo", "nccl", "rendezvous", "connection", "closed by peer", "timed out", "timeout", "aborted", "broken pipe", "socket"]
            .iter()
            .any(|word| text.contains(word))
    }
}

#[repr(C)]
struct StoreCallbacks {
    context: *const c_void,
    set: extern "C" fn(*const c_void, *const c_char, usize, *const u8, usize) -> c_int,
    get: extern "C" fn(*const c_void, *const c_char, usize, i64, *mut c_void, extern "C" fn(*mut c_void, *const u8, usize)) -> c_int,
    check: extern "C" fn(*const c_void, *const c_char, usize) -> c_int,
}

#[repr(C)]
struct LayerCallbacks {
    context: *const c_void,
    run: extern "C" fn(*const c_void, i64, *const c_void) -> *mut c_void,
    drop: extern "C" fn(*const c_void),
}

unsafe extern "C" {
    fn everlit_error() -> *const c_char;
    fn everlit_set_threads(intra: c_int, inter: c_int) -> c_int;
    fn everlit_group_new(
        store: StoreCallbacks,
        rank: c_int,
        size: c_int,
        host: *const c_char,
        nccl: c_int,
        setup_ms: i64,
        timeout_ms: i64,
        out: *mut *mut c_void,
    ) -> c_int;
    fn everlit_group_free(group: *mut c_void);
    fn everlit_group_abort(group: *mut c_void) -> c_int;
    fn everlit_group_check(group: *mut c_void) -> c_int;
    fn everlit_group_all_reduce(group: *mut c_void, tensor: *mut c_void) -> c_int;
    fn everlit_group_send(group: *mut c_void, tensor: *mut c_void, to: c_int, tag: c_int, out: *mut *mut c_void) -> c_int;
    fn everlit_group_receive(group: *mut c_void, tensor: *mut c_void, from: c_int, tag: c_int, out: *mut *mut c_void) -> c_int;
    fn everlit_work_wait(work: *mut c_void) -> c_int;
    fn everlit_reducer_new(
        group: *mut c_void,
        tensors: *const *mut c_void,
        count: usize,
        order: *const usize,
        buckets: *const usize,
        out: *mut *mut c_void,
    ) -> c_int;
    fn everlit_reducer_free(reducer: *mut c_void);
    fn everlit_reducer_prepare(reducer: *mut c_void) -> c_int;
    fn everlit_reducer_waited(reducer: *mut c_void, seconds: *mut f64) -> c_int;
    fn everlit_adamw_new(
        parameters: *const *mut c_void,
        first: *const *mut c_void,
        second: *const *mut c_void,
        count: usize,
        out: *mut *mut c_void,
    ) -> c_int;
    fn everlit_adamw_free(optimizer: *mut c_void);
    fn everlit_adamw_step(
        optimizer: *mut c_void,
        step: i64,
        rate: f64,
        beta1: f64,
        beta2: f64,
        decay: f64,
        epsilon: f64,
        scale: f64,
    ) -> c_int;
    fn everlit_gradient_norm(tensors: *const *mut c_void, count: usize, norm: *mut f64) -> c_int;
    fn everlit_recompute(input: *const c_void, layer: LayerCallbacks, number: i64, out: *mut *mut c_void) -> c_int;
    fn everlit_drop_gradients(tensors: *const *mut c_void, count: usize) -> c_int;
}

pub(super) fn check(code: c_int) -> Result<(), CollectiveError> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: a NUL-terminated string of this thread, valid until the next call.
    let text = unsafe { CStr::from_ptr(everlit_error()) };
    Err(CollectiveError::from_message(&text.to_string_lossy()))
}

fn pointers(tensors: &[&Tensor]) -> Vec<*mut c_void> {
    tensors.iter().map(|tensor| tensor.as_ptr().cast_mut().cast()).collect()
}

/// Threads of libtorch's CPU kernels; called once, before the first operation.
pub fn set_threads(threads: i32) -> Result<(), CollectiveError> {
    // SAFETY: plain numbers.
    check(unsafe { everlit_set_threads(threads, 1) })
}

extern "C" fn store_set(context: *const c_void, key: *const c_char, key_bytes: usize, value: *const u8, bytes: usize) -> c_int {
    // SAFETY: the context is the rendezvous that `Group` holds; the buffers are of the caller's strings.
    let (store, key, value) = unsafe { (&*context.cast::<Rendezvous>(), key_text(key, key_bytes), bytes_of(value, bytes)) };
    store.set(&key, value).is_err().into()
}

extern "C" fn store_get(
    context: *const c_void,
    key: *const c_char,
    key_bytes: usize,
    timeout_ms: i64,
    into: *mut c_void,
    got: extern "C" fn(*mut c_void, *const u8, usize),
) -> c_int {
    // SAFETY: as in `store_set`.
    let (store, key) = unsafe { (&*context.cast::<Rendezvous>(), key_text(key, key_bytes)) };
    let timeout = Duration::from_millis(u64::try_from(timeout_ms).unwrap_or(0));
    match store.get(&key, timeout) {
        Ok(value) => {
            got(into, value.as_ptr(), value.len());
            0
        }
        Err(_) => 1,
    }
}

extern "C" fn store_check(context: *const c_void, key: *const c_char, key_bytes: usize) -> c_int {
    // SAFETY: as in `store_set`.
    let (store, key) = unsafe { (&*context.cast::<Rendezvous>(), key_text(key, key_bytes)) };
    (!store.has(&key)).into()
}

unsafe fn bytes_of<'a>(start: *const u8, bytes: usize) -> &'a [u8] {
    // SAFETY: by the caller; an empty vector's pointer may be null.
    if bytes == 0 { &[] } else { unsafe { std::slice::from_raw_parts(start, bytes) } }
}

unsafe fn key_text(start: *const c_char, bytes: usize) -> String {
    // SAFETY: by the caller.
    String::from_utf8_lossy(unsafe { bytes_of(start.cast(), bytes) }).into_owned()
}

/// What moves the tensors of a GPU; those of the processor are always Gloo's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Through the machine's memory and TCP. Several ranks may share a GPU.
    Gloo,
    /// From GPU to GPU. Each rank has one of its own.
    Nccl,
}

/// One membership of ranks, connected by Gloo over TCP and, for GPUs, by NCCL.
pub struct Group {
    raw: *mut c_void,
    // Both may ask it until the group is gone.
    _store: Arc<Rendezvous>,
}

// SAFETY: c10d's groups are used from several threads by design (abort while a collective runs).
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Connects to all ranks; every one of them must have announced itself already, since this can not be aborted.
    pub fn connect(
        store: Arc<Rendezvous>,
        host: &str,
        backend: Backend,
        setup: Duration,
        timeout: Duration,
    ) -> Result<Self, CollectiveError> {
        let host = CString::new(host).map_err(|_| CollectiveError("the host's name has a NUL".into()))?;
        let callbacks = StoreCallbacks { context: Arc::as_ptr(&store).cast(), set: store_set, get: store_get, check: store_check };
        let mut raw = std::ptr::null_mut();
        let number = |n: u32| c_int::try_from(n).map_err(|_| CollectiveError("too many ranks".into()));
        let (rank, size) = (number(store.rank())?, number(store.world())?);
        let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let nccl = c_int::from(backend == Backend::Nccl);
        // SAFETY: the store outlives the group, which holds it.
        check(unsafe { everlit_group_new(callbacks, rank, size, host.as_ptr(), nccl, ms(setup), ms(timeout), &mut raw) })?;
        Ok(Self { raw, _store: store })
    }

    /// Makes every running and later collective of this rank fail at once. From any thread.
    pub fn abort(&self) -> Result<(), CollectiveError> {
        // SAFETY: `raw` is valid while `self` is.
        check(unsafe { everlit_group_abort(self.raw) })
    }

    /// Whether the group still stands. NCCL's failures show only here, once a collective's result was waited for; without this
    /// question what it left in the tensors would be taken for sums.
    pub fn check(&self) -> Result<(), CollectiveError> {
        // SAFETY: `raw` is valid while `self` is.
        check(unsafe { everlit_group_check(self.raw) })
    }

    /// Sums `tensor` over all ranks, in place. On a GPU the sum is only queued.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<(), CollectiveError> {
        // SAFETY: `raw` and the tensor are valid; libtorch keeps its own reference.
        check(unsafe { everlit_group_all_reduce(self.raw, tensor.as_ptr().cast_mut().cast()) })
    }
}

impl Group {
    /// Begins to send a tensor in the machine's memory to another rank, which must receive one of the same size under the same tag.
    pub fn send(&self, tensor: Tensor, to: u32, tag: usize) -> Result<Transfer<'_>, CollectiveError> {
        self.transfer(tensor, to, tag, everlit_group_send)
    }

    /// Begins to fill a tensor in the machine's memory with what another rank sends under this tag. After an error what is in it is undefined.
    pub fn receive(&self, tensor: Tensor, from: u32, tag: usize) -> Result<Transfer<'_>, CollectiveError> {
        self.transfer(tensor, from, tag, everlit_group_receive)
    }

    fn transfer(
        &self,
        tensor: Tensor,
        peer: u32,
        tag: usize,
        begin: unsafe extern "C" fn(*mut c_void, *mut c_void, c_int, c_int, *mut *mut c_void) -> c_int,
    ) -> Result<Transfer<'_>, CollectiveError> {
        let peer = c_int::try_from(peer).map_err(|_| CollectiveError("too many ranks".into()))?;
        let tag = c_int::try_from(tag).map_err(|_| CollectiveError("too many tensors".into()))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` and the tensor are valid; the work is ours.
        check(unsafe { begin(self.raw, tensor.as_ptr().cast_mut().cast(), peer, tag, &mut raw) })?;
        Ok(Transfer { raw, _tensor: tensor, _group: self })
    }
}

/// Bytes on their way between two ranks. One that is dropped is waited for: Gloo has hold of the tensor's memory until then.
pub struct Transfer<'a> {
    raw: *mut c_void,
    _tensor: Tensor,
    _group: &'a Group,
}

impl Transfer<'_> {
    /// Blocks until the bytes are out or in.
    pub fn wait(mut self) -> Result<(), CollectiveError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), CollectiveError> {
        let raw = std::mem::replace(&mut self.raw, std::ptr::null_mut());
        // SAFETY: the work is valid, and freed by this call alone.
        if raw.is_null() { Ok(()) } else { check(unsafe { everlit_work_wait(raw) }) }
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        // Whoever drops one has the group's error already.
        let _ = self.end();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: made by `everlit_group_new`, freed once.
        unsafe { everlit_group_free(self.raw) }
    }
}

/// Averages gradients over a group while the backward pass runs. Its buckets are fixed for good.
pub struct Reducer {
    raw: *mut c_void,
    _group: Arc<Group>,
}

impl Reducer {
    /// `buckets` lists each bucket's parameters, by index, in the order of reduction.
    pub fn new(group: Arc<Group>, parameters: &[&Tensor], buckets: &[Vec<usize>]) -> Result<Self, CollectiveError> {
        let order: Vec<usize> = buckets.iter().flatten().copied().collect();
        let of: Vec<usize> = buckets.iter().enumerate().flat_map(|(bucket, members)| members.iter().map(move |_| bucket)).collect();
        assert_eq!(order.len(), parameters.len(), "each parameter is in one bucket");
        let list = pointers(parameters);
        let mut raw = std::ptr::null_mut();
        // SAFETY: the three arrays have one entry per parameter; the group is valid.
        check(unsafe { everlit_reducer_new(group.raw, list.as_ptr(), list.len(), order.as_ptr(), of.as_ptr(), &mut raw) })?;
        Ok(Self { raw, _group: group })
    }

    /// Before each forward pass. The backward pass then blocks until all gradients are averaged; it fails soon after the group was aborted.
    pub fn prepare(&self) -> Result<(), CollectiveError> {
        // SAFETY: `raw` is valid while `self` is.
        check(unsafe { everlit_reducer_prepare(self.raw) })
    }

    /// How long the last backward pass, which took `most`, waited for the other ranks once its own gradients were there.
    pub fn waited(&self, most: Duration) -> Result<Duration, CollectiveError> {
        let mut seconds = 0.0;
        // SAFETY: `raw` is valid while `self` is.
        check(unsafe { everlit_reducer_waited(self.raw, &mut seconds) })?;
        Ok(Duration::try_from_secs_f64(seconds).unwrap_or_default().min(most))
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: made by `everlit_reducer_new`, freed once.
        unsafe { everlit_reducer_free(self.raw) }
    }
}

/// Decoupled weight decay Adam over parameters and moments that the caller holds.
pub struct AdamW {
    raw: *mut c_void,
    decay: f64,
}

impl AdamW {
    /// First and second moments have the parameters' shapes.
    pub fn new(parameters: &[&Tensor], first: &[&Tensor], second: &[&Tensor], decay: f64) -> Result<Self, CollectiveError> {
        assert!(parameters.len() == first.len() && first.len() == second.len(), "one pair of moments per parameter");
        let (own, m, v) = (pointers(parameters), pointers(first), pointers(second));
        let mut raw = std::ptr::null_mut();
        // SAFETY: three arrays of the same length.
        check(unsafe { everlit_adamw_new(own.as_ptr(), m.as_ptr(), v.as_ptr(), own.len(), &mut raw) })?;
        Ok(Self { raw, decay })
    }

    /// One update, number `step` from 1, with the gradients divided by `scale`. Every parameter has a gradient.
    pub fn step(&self, step: u64, rate: f64, scale: f64) -> Result<(), CollectiveError> {
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        // SAFETY: `raw` is valid while `self` is.
        check(unsafe { everlit_adamw_step(self.raw, step, rate, 0.9, 0.95, self.decay, 1e-8, scale) })
    }
}

impl Drop for AdamW {
    fn drop(&mut self) {
        // SAFETY: made by `everlit_adamw_new`, freed once.
        unsafe { everlit_adamw_free(self.raw) }
    }
}

/// The norm of all gradients together.
pub fn gradient_norm(tensors: &[&Tensor]) -> Result<f64, CollectiveError> {
    let list = pointers(tensors);
    let mut norm = 0.0;
    // SAFETY: valid tensors, each with a gradient (else an error).
    check(unsafe { everlit_gradient_norm(list.as_ptr(), list.len(), &mut norm) })?;
    Ok(norm)
}

/// A part of a model that can be run again from its input.
pub trait Layers {
    /// Layer `layer` of an input. The same answer each time.
    fn run(&self, layer: i64, input: &Tensor) -> Tensor;
}

/// Runs a layer keeping only its input: the backward pass runs it again. The graph holds `layers` until then.
///
/// On a GPU that is another thread of libtorch's, while this one waits for it.
pub fn recompute<L: Layers + Send + Sync + 'static>(layers: &Arc<L>, number: i64, input: &Tensor) -> Result<Tensor, CollectiveError> {
    extern "C" fn run<L: Layers>(context: *const c_void, number: i64, input: *const c_void) -> *mut c_void {
        let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // SAFETY: `context` is a reference that the graph holds; the input is a live tensor, of which a reference is taken.
            let (layers, input) = unsafe { (&*context.cast::<L>(), Tensor::clone_from_ptr(input.cast_mut().cast())) };
            std::mem::ManuallyDrop::new(layers.run(number, &input)).as_ptr()
        }));
        answer.map_or(std::ptr::null_mut(), |tensor| tensor.cast_mut().cast())
    }
    extern "C" fn drop_one<L>(context: *const c_void) {
        // SAFETY: the reference that `recompute` gave away, taken back once.
        drop(unsafe { Arc::from_raw(context.cast::<L>()) });
    }
    let layer = LayerCallbacks { context: Arc::into_raw(layers.clone()).cast(), run: run::<L>, drop: drop_one::<L> };
    let mut raw = std::ptr::null_mut();
    // SAFETY: the callee owns the reference from here on; the answer is a tensor of our own.
    unsafe {
        check(everlit_recompute(input.as_ptr().cast(), layer, number, &mut raw))?;
        Ok(Tensor::from_ptr(raw.cast()))
    }
}

/// Forgets the gradients; the next backward pass makes new ones.
pub fn drop_gradients(tensors: &[&Tensor]) -> Result<(), CollectiveError> {
    let list = pointers(tensors);
    // SAFETY: valid tensors.
    check(unsafe { everlit_drop_gradients(list.as_ptr(), list.len()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backward_pass_ends_as_soon_as_the_group_was_aborted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Rendezvous::open(&format!("dir:{}", dir.path().display()), 0, 0, 1).unwrap());
        let group = Group::connect(store, "127.0.0.1", Backend::Gloo, Duration::from_secs(20), Duration::from_secs(20)).unwrap();
        let group = Arc::new(group);
        let layers: Vec<Tensor> = (0..3).map(|_| Tensor::ones([4, 4], tch::kind::FLOAT_CPU).set_requires_grad(true)).collect();
        let list: Vec<&Tensor> = layers.iter().collect();
        let reducer = Reducer::new(group.clone(), &list, &[vec![2, 1, 0]]).unwrap();
        let pass = || {
            reducer.prepare().unwrap();
            let output = layers.iter().fold(Tensor::ones([1, 4], tch::kind::FLOAT_CPU), |x, layer| x.matmul(layer));
            output.sum(tch::Kind::Float).f_backward()
        };
        pass().unwrap();
        assert!(layers.iter().all(|layer| layer.grad().defined()));
        drop_gradients(&list).unwrap();
        group.abort().unwrap();
        let error = CollectiveError::from_message(&pass().unwrap_err().to_string());
        assert!(error.is_peer_lost(), "{error}");
        let known: Vec<bool> = layers.iter().map(|layer| layer.grad().defined()).collect();
        assert_eq!(known, [false, false, false], "no gradient was computed for nobody");
        // What follows in the same process is as if that had not been.
        drop(reducer);
        let output = layers.iter().fold(Tensor::ones([1, 4], tch::kind::FLOAT_CPU), |x, layer| x.matmul(layer));
        output.sum(tch::Kind::Float).f_backward().unwrap();
        assert!(layers.iter().all(|layer| layer.grad().defined()));
    }
}
