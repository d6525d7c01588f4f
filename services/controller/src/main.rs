//! The controller process: flags, telemetry, bind, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use slotmesh_controller::{
    app::App,
    settings::{Flags, Settings},
};
use slotmesh_runtime::{settings::EXIT_USAGE, shutdown, telemetry};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

#[tokio::main]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    let _telemetry = telemetry::init("slotmesh-controller");
    let settings = match Settings::load(flags) {
        Ok(settings) => settings,
        Err(error) => {
            error!("{:#}", anyhow::Error::new(error));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    info!(?settings, "starting");
    let stop = CancellationToken::new();
    let on_signal = stop.clone();
    tokio::spawn(async move {
        if let Err(error) = shutdown::signalled().await {
            error!(%error, "signals can't be handled");
        }
        on_signal.cancel();
    });
    let ended = match App::bind(settings).await {
        Ok(app) => app.run(stop).await,
        Err(error) => Err(error),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
