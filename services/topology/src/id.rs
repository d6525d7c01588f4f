//! Names and orders. Each is its own type, so that one is never passed where another belongs.

use std::fmt;

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// True for the name that stands for "none".
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.0.is_empty()
            }
        }

        impl<T: Into<String>> From<T> for $type {
            fn from(text: T) -> Self {
                Self(text.into())
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

macro_rules! order {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
        pub struct $type(pub u64);

        impl $type {
            /// The one after it.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

name!(
    /// An instance, such as `r-5f0c21`.
    InstanceId
);
name!(
    /// A shard within its instance: its index as text.
    ShardId
);
name!(
    /// A Redis process of a shard, such as `r-5f0c21-0-1`.
    NodeId
);
name!(
    /// A machine with one agent.
    HostId
);
name!(
    /// A proxy process.
    ProxyId
);
name!(
    /// A task.
    TaskId
);
order!(
    /// Order of the primaries of one shard. 0: has never served.
    Epoch
);
order!(
    /// Order of controller leaders.
    Term
);
order!(
    /// Order of documents of one store.
    Revision
);
