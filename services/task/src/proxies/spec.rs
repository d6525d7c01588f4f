//! A change of proxies as its record keeps it: what is asked for, and how far each proxy has come.
//!
//! Invariant: a part has a generation exactly while its placement may say something else than before.

use slotmesh_topology::{HostId, ProxyId};

/// Another process for some of an instance's proxies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Changes {
    /// Artifact that they run in the end; a restart has none.
    pub program: String,
    /// Each gets another process of the program that it has.
    pub restart: bool,
    /// For how long each is watched before the next one.
    pub bake_ms: u64,
    /// Hand-overs begin in the maintenance window only.
    pub in_window: bool,
    /// Each gets a successor on another host, to which its clients go.
    pub rebuild: Option<Rebuild>,
    /// Of a restart: workers that each has in the end; 0: as before.
    pub workers: u32,
    /// No further one begins.
    pub paused: bool,
    /// In their order; the first is the canary.
    pub proxies: Vec<Change>,
}

/// How proxies are built anew on other hosts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rebuild {
    /// Where; `None`: chosen when its turn comes.
    pub host: Option<HostId>,
    /// How long clients of the old one are given to go.
    pub drain_ms: u64,
}

/// The proxy that is to serve in the place of another one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Successor {
    /// Which proxy.
    pub proxy: ProxyId,
    /// Where it runs.
    pub host: HostId,
}

/// One proxy's part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// Which proxy.
    pub proxy: ProxyId,
    /// Where it runs.
    pub host: HostId,
    /// How far it has come. Written together with what the phase stands for.
    pub phase: ProxyPhase,
    /// Since when.
    pub phase_since_ms: u64,
    /// What it waits for, or how it ended.
    pub message: String,
    /// As its placement had it; empty: the agent's own.
    pub from_program: String,
    /// As its placement had it.
    pub from_generation: u64,
    /// As its placement had it.
    pub from_workers: u32,
    /// That its agent reported; empty: it had not.
    pub from_version: String,
    /// That the new process reports; empty: it does not serve yet.
    pub to_version: String,
    /// That its placement was given; 0: none yet.
    pub generation: u64,
    /// Why it goes back to what was before.
    pub why_back: Option<String>,
    /// It was an operator who turned it back.
    pub on_request: bool,
    /// What the process of before had counted.
    pub before: Counted,
    /// The process that is watched.
    pub pid: u32,
    /// How long its hand-over took, in microseconds; 0: not known.
    pub handover_us: u64,
    /// Clients that were passed.
    pub clients: u32,
    /// An operator ends the bake, or leaves a parked one as it is.
    pub finalize: bool,
    /// Since when its successor is watched, however often that had to begin anew; 0: its bake is over, or
    /// was begun by an older leader.
    pub bake_since_ms: u64,
    /// The last one that was placed for it.
    pub successor: Option<Successor>,
}

/// What a proxy's process has counted since its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counted {
    /// Commands of clients.
    pub commands: u64,
    /// Error replies, by any cause.
    pub errors: u64,
}

/// Phases of one proxy's change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ProxyPhase {
    /// Waits for its turn, or its time.
    Ready,
    /// It is its turn: it, the other proxies and the shards are looked at.
    Check,
    /// The placement says what it should run; its agent sees to it.
    HandOver,
    /// A successor is placed on another host; its agent starts it.
    Build,
    /// The new process serves, and is watched.
    Bake,
    /// The successor serves; clients of the old one go elsewhere.
    Drain,
    /// The placement says again what it ran before.
    Back,
    /// It could not go back by itself. It serves.
    Parked,
    /// It runs what was asked for.
    Done,
    /// It serves as before.
    RolledBack,
    /// It can't be changed now; nothing was.
    Skipped,
}

impl ProxyPhase {
    /// Every phase, in order.
    pub const ALL: [Self; 11] = [
        Self::Ready,
        Self::Check,
        Self::HandOver,
        Self::Build,
        Self::Bake,
        Self::Drain,
        Self::Back,
        Self::Parked,
        Self::Done,
        Self::RolledBack,
        Self::Skipped,
    ];
    /// Phases before the end, for progress displays.
    pub const STEPS: u32 = 4;

    /// Name as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Check => "Check",
            Self::HandOver => "HandOver",
            Self::Build => "Build",
            Self::Drain => "Drain",
            Self::Bake => "Bake",
            Self::Back => "Back",
            Self::Parked => "Parked",
            Self::Done => "Done",
            Self::RolledBack => "RolledBack",
            Self::Skipped => "Skipped",
        }
    }

    /// How many of them are behind it.
    #[must_use]
    pub fn steps_done(self) -> u32 {
        match self {
            Self::Ready => 0,
            Self::Check => 1,
            Self::HandOver | Self::Build | Self::Back | Self::Parked => 2,
            Self::Bake | Self::Drain => 3,
            Self::Done | Self::RolledBack | Self::Skipped => Self::STEPS,
        }
    }

    /// Nothing follows it.
    #[must_use]
    pub fn is_ended(self) -> bool {
        matches!(self, Self::Done | Self::RolledBack | Self::Skipped)
    }

    /// It has changed nothing yet.
    #[must_use]
    pub fn is_before(self) -> bool {
        matches!(self, Self::Ready | Self::Check)
    }
}

impl Changes {
    /// One proxy's part.
    #[must_use]
    pub fn part(&self, proxy: &ProxyId) -> Option<&Change> {
        self.proxies.iter().find(|p| p.proxy == *proxy)
    }

    /// As [`Changes::part`], to change it.
    pub fn part_mut(&mut self, proxy: &ProxyId) -> Option<&mut Change> {
        self.proxies.iter_mut().find(|p| p.proxy == *proxy)
    }

    /// The program that this proxy gets.
    #[must_use]
    pub fn program<'a>(&'a self, part: &'a Change) -> &'a str {
        match self.restart {
            true => &part.from_program,
            false => &self.program,
        }
    }

    /// A proxy has had its turn, and was changed.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        let has_begun = |p: &Change| p.generation > 0 || p.successor.is_some();
        self.proxies.iter().any(has_begun)
    }

    /// A proxy waits for an operator.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.proxies.iter().any(|p| p.phase == ProxyPhase::Parked)
    }

    /// Steps behind it and in all.
    #[must_use]
    pub fn progress(&self) -> (u32, u32) {
        let done = self.proxies.iter().map(|p| p.phase.steps_done()).sum();
        let all = self.proxies.iter().map(|_| ProxyPhase::STEPS).sum();
        (done, all)
    }
}
