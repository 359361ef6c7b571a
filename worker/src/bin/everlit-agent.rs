//! Supervises the ranks of one node; everything is in [`everlit_worker::agent`].

fn main() -> std::process::ExitCode {
    everlit_worker::agent::cli::main()
}
