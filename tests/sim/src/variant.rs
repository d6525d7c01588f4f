//! Deliberately broken code paths: they prove that the checks can fail.
//!
//! Invariant: each breaks one rule of the protocol and nothing else.

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
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
}

impl Variant {
    /// All that are broken.
    pub const BROKEN: [Self; 9] = [
        Self::NoFence,
        Self::GrantBeforeCommit,
        Self::CommitWithoutToken,
        Self::DeposedLeaderWrites,
        Self::NotBornFenced,
        Self::CommitUnproven,
        Self::Forgetful,
        Self::PromoteBehind,
        Self::ProxyGoesBack,
    ];
}
