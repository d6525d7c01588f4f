//! `slotmesh-bench`: measures, prints, and exits with 1 when a promise was broken.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use slotmesh_bench::{proxy, switchover};

/// Measures a mesh with foreign clients.
#[derive(Debug, Parser)]
#[command(name = "slotmesh-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Switchovers back and forth under load: what is lost, what clients notice.
    Switchover(switchover::Args),
    /// What a request costs in our proxy, beside a direct connection and twemproxy.
    Proxy(proxy::ProxyArgs),
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let kept = match Cli::parse().command {
        Command::Switchover(args) => Box::pin(switchover::main(args)).await,
        Command::Proxy(args) => Box::pin(proxy::run(args)).await,
    };
    Ok(if kept? {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
