//! temporary
use everlit_api::time::Millis;
fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_env_filter("info").init();
    let args: Vec<String> = std::env::args().collect();
    let settings = everlit_coordinator::shell::up::Settings {
        listen: args[2].parse()?,
        data_dir: args[3].clone().into(),
        report_interval: Millis::secs(1),
        node_timeout: Millis::secs(10),
        rendezvous_ports: (29500, 29999),
        retain_jobs: Millis::secs(86400 * 30),
        local_agent: true,
    };
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(everlit_coordinator::shell::up::up(settings))
}
