//! What makes the time of a calm run hard.
//!
//! Invariant: each period of it ends by itself, also when this program dies: loops run under a time
//! limit of their own, and rules of packets are in namespaces that go with the run.

use std::{
    process::{Child, Command},
    time::Duration,
};

use anyhow::Context as _;
use slotmesh_harness::signals;

use super::Args;
use crate::chaos::{
    mesh::{CONTROLLERS, HOSTS, Mesh, OPS, STORE},
    net::Net,
};

/// All of it comes back after so long.
const CYCLE: u64 = 240;
/// Seconds of a cycle in which processors are wanted by others.
const STARVED: [std::ops::Range<u64>; 2] = [0..60, 120..180];
/// When in a cycle a primary stands still: in a starved minute, and in one that is not.
const SLEEPS: [u64; 2] = [30, 210];

/// Everything that is wrong now, and how often it was.
#[derive(Debug)]
pub(super) struct Nuisance {
    lose_one_in: u32,
    loops: u32,
    sleep_seconds: u32,
    running: Vec<Child>,
    starved: u32,
    starved_lately: bool,
    slept: u32,
    slept_before: u32,
    /// Number of the last sleep that was begun, over all cycles.
    sleep: Option<u64>,
}

impl Nuisance {
    pub(super) fn new(args: &Args) -> Self {
        Self {
            lose_one_in: args.lose_one_in,
            loops: args.loops,
            sleep_seconds: args.sleep_seconds,
            running: Vec::new(),
            starved: 0,
            starved_lately: false,
            slept: 0,
            slept_before: 0,
            sleep: None,
        }
    }

    /// Periods of busy loops so far.
    pub(super) fn starved(&self) -> u32 {
        self.starved
    }

    /// How often a primary stood still.
    pub(super) fn slept(&self) -> u32 {
        self.slept
    }

    /// What was wrong since this was last asked, for people.
    pub(super) fn minute(&mut self) -> String {
        let loops = match std::mem::take(&mut self.starved_lately) {
            true => "with busy loops",
            false => "no loops",
        };
        let slept = self.slept - std::mem::replace(&mut self.slept_before, self.slept);
        format!("{loops}, {slept} sleeps of a primary")
    }

    /// Begins to lose packets on every link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn lose(&self, mesh: &Mesh) -> anyhow::Result<()> {
        if self.lose_one_in == 0 {
            return Ok(());
        }
        everywhere(|name| mesh.net().lose(name, self.lose_one_in))
    }

    /// Does what is due at this time of the run.
    pub(super) async fn turn(&mut self, mesh: &Mesh, elapsed: Duration) {
        let now = elapsed.as_secs();
        let period = STARVED.iter().find(|p| p.contains(&(now % CYCLE)));
        match period {
            Some(period) if self.running.is_empty() => {
                if let Err(error) = self.starve(period.end - now % CYCLE) {
                    super::say(&format!("no busy loops: {error:#}"));
                }
            }
            Some(_) => self.starved_lately = true,
            None => self.rest(),
        }
        let half = CYCLE / 2;
        let turn = now / half;
        let due = SLEEPS[(turn % 2) as usize] % half;
        if self.sleep_seconds > 0 && now % half >= due && self.sleep != Some(turn) {
            self.sleep = Some(turn);
            match stand_still(mesh, turn, self.sleep_seconds).await {
                Ok(()) => self.slept += 1,
                Err(error) => super::say(&format!("no primary could be made to sleep: {error:#}")),
            }
        }
    }

    fn starve(&mut self, seconds: u64) -> anyhow::Result<()> {
        self.starved += 1;
        for _ in 0..self.loops {
            let child = Command::new("timeout")
                .args([&*seconds.to_string(), "sh", "-c", "while :; do :; done"])
                .spawn()
                .context("start a busy loop")?;
            self.running.push(child);
        }
        Ok(())
    }

    /// They end by themselves at the same time; this is for those that are late.
    fn rest(&mut self) {
        for mut child in self.running.drain(..) {
            let _ = signals::terminate(child.id());
            let _ = child.wait();
        }
    }

    /// Ends all of it.
    pub(super) fn end(&mut self, mesh: &Mesh) {
        self.rest();
        if let Err(error) = everywhere(|name| Net::heal(mesh.net(), name)) {
            super::say(&format!("packets may still be lost: {error:#}"));
        }
    }
}

fn everywhere(mut act: impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let all = HOSTS.iter().chain(&CONTROLLERS).chain(&[STORE, OPS]);
    all.into_iter().try_for_each(|name| act(name))
}

/// Begins a sleep of a primary; its end is not waited for.
async fn stand_still(mesh: &Mesh, turn: u64, seconds: u32) -> anyhow::Result<()> {
    let which = usize::try_from(turn)?;
    let (pid, _) = mesh.node(which, true).await?;
    let mut admin = Mesh::admin(pid).await?;
    tokio::spawn(async move {
        let sleep = redis::cmd("DEBUG").arg("SLEEP").arg(seconds).to_owned();
        let slept: redis::RedisResult<()> = sleep.query_async(&mut admin).await;
        if let Err(error) = slept {
            super::say(&format!("a sleep was refused or broken off: {error}"));
        }
    });
    Ok(())
}
