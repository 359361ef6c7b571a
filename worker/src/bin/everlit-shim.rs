//! The small parent of one rank; everything is in [`everlit_worker::shim`].

fn main() -> std::process::ExitCode {
    everlit_worker::shim::main()
}
