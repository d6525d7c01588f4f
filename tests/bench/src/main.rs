//! `slotmesh-bench`: measures, prints, and exits with 1 when a promise was broken.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use slotmesh_bench::{chaos, proxy, switchover};

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
    /// Faults against a mesh in network namespaces of its own: what clients were told must be so.
    Chaos(chaos::Args),
    #[command(hide = true)]
    ChaosInsider(chaos::InsiderArgs),
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let kept = match Cli::parse().command {
        Command::Switchover(args) => Box::pin(switchover::main(args)).await,
        Command::Proxy(args) => Box::pin(proxy::run(args)).await,
        Command::Chaos(args) => Box::pin(chaos::main(args)).await,
        Command::ChaosInsider(args) => Box::pin(chaos::insider(args)).await,
    };
    Ok(if kept? {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
