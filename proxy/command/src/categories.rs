//! ACL categories: the groups of commands that `+@read` and its like name.
//!
//! Invariant: the names and their order are those of Redis 7.0's ACL CAT.

/// A set of [`Category`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Categories(u32);

macro_rules! categories {
    ($($category:ident = $name:literal,)*) => {
        /// One group of commands.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Category {
            $($category,)*
        }

        impl Category {
            /// All of them, in the order of ACL CAT.
            pub const ALL: &[Self] = &[$(Self::$category,)*];

            /// Without the `@`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$category => $name,)*
                }
            }
        }
    };
}

categories! {
    Keyspace = "keyspace",
    Read = "read",
    Write = "write",
    Set = "set",
    SortedSet = "sortedset",
    List = "list",
    Hash = "hash",
    String = "string",
    Bitmap = "bitmap",
    HyperLogLog = "hyperloglog",
    Geo = "geo",
    Stream = "stream",
    PubSub = "pubsub",
    Admin = "admin",
    Fast = "fast",
    Slow = "slow",
    Blocking = "blocking",
    Dangerous = "dangerous",
    Connection = "connection",
    Transaction = "transaction",
    Scripting = "scripting",
}

impl Category {
    /// The category of this name, without the `@` and in letters of any case.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let named = |category: &&Self| category.name().eq_ignore_ascii_case(name);
        Self::ALL.iter().find(named).copied()
    }
}

impl Categories {
    #[must_use]
    pub fn has(self, category: Category) -> bool {
        self.0 & (1 << category as u32) != 0
    }

    /// Those of the set, in the order of ACL CAT.
    pub fn iter(self) -> impl Iterator<Item = Category> {
        let all = Category::ALL.iter().copied();
        all.filter(move |&category| self.has(category))
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        text.split(',')
            .filter(|name| !name.is_empty())
            .try_fold(Self::default(), |set, name| {
                Some(Self(set.0 | 1 << Category::parse(name)? as u32))
            })
    }
}
