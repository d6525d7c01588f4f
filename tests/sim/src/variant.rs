//! Deliberately broken code paths: they prove that the checks can fail.
//!
//! Invariant: each breaks one rule of the protocol and nothing else.

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum Variant {
    /// The code as it is.
    #[default]
    Real,
    /// The old primary's agent hands over without taking its proxies' rights first.
    NoFence,
    /// The target gets the next epoch's proxy user before the epoch is committed.
    GrantBeforeCommit,
    /// Any commit is taken, whatever token it presents.
    CommitWithoutToken,
    /// A leader writes without comparing the leader's key.
    DeposedLeaderWrites,
    /// A process keeps its users over a restart.
    NotBornFenced,
    /// An agent commits as soon as it has ordered the change of roles, not when it has seen it.
    CommitUnproven,
    /// An agent executes a step again that it has executed already.
    Forgetful,
    /// The target is promoted by hand, without waiting for the old primary's last bytes.
    PromoteBehind,
    /// A proxy takes every route, also one of a lower epoch.
    ProxyGoesBack,
    /// Somebody is promoted although nothing proves that the lost primary is fenced.
    NoProof,
    /// The end of a lease is believed, not compared in the transaction that relies on it.
    LeaseNotCompared,
    /// An agent goes on serving when its right has ended.
    NoSelfFence,
    /// A right that comes back counts for assignments of before it, too.
    LiftsEarly,
    /// Not the most advanced replica is promoted.
    NotHighest,
    /// A process that was started again is promoted, whatever it has.
    AnyProcess,
    /// Replicas of a dead primary are taken for replicas that are behind.
    ForgetsReplicas,
    /// An agent promotes although it has promised not to.
    IgnoresPromise,
    /// A node has left before its right to follow is gone.
    LeavesFed,
}

impl Variant {
    /// All that are broken.
    pub const BROKEN: [Self; 18] = [
        Self::NoFence,
        Self::GrantBeforeCommit,
        Self::CommitWithoutToken,
        Self::DeposedLeaderWrites,
        Self::NotBornFenced,
        Self::CommitUnproven,
        Self::Forgetful,
        Self::PromoteBehind,
        Self::ProxyGoesBack,
        Self::NoProof,
        Self::LeaseNotCompared,
        Self::NoSelfFence,
        Self::LiftsEarly,
        Self::NotHighest,
        Self::AnyProcess,
        Self::ForgetsReplicas,
        Self::IgnoresPromise,
        Self::LeavesFed,
    ];
}
