//! Values of expressions and their types, as HCL has them: lists and maps whose elements share a
//! type, tuples and objects whose elements do not, and null of every type.

use std::{cmp::Ordering, collections::BTreeMap, fmt, sync::Arc};

use crate::number::Number;

/// What an attribute of an object type is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) ty: Type,
    pub(crate) optional: bool,
}

/// The type of a value, or what a value has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    /// Any type; of a value, that of a null without a type.
    Dynamic,
    Bool,
    Number,
    String,
    List(Arc<Type>),
    Set(Arc<Type>),
    Map(Arc<Type>),
    Tuple(Arc<[Type]>),
    Object(Arc<BTreeMap<String, Field>>),
}

impl Type {
    pub(crate) fn list(of: Type) -> Self {
        Self::List(Arc::new(of))
    }

    pub(crate) fn set(of: Type) -> Self {
        Self::Set(Arc::new(of))
    }

    pub(crate) fn map(of: Type) -> Self {
        Self::Map(Arc::new(of))
    }

    /// An object of attributes that all have to be there.
    pub(crate) fn object(fields: impl IntoIterator<Item = (String, Type)>) -> Self {
        let field = |(name, ty)| (name, Field { ty, optional: false });
        Self::Object(Arc::new(fields.into_iter().map(field).collect()))
    }

    pub(crate) fn is_primitive(&self) -> bool {
        matches!(self, Self::Bool | Self::Number | Self::String)
    }

    /// Whether elements share a type.
    pub(crate) fn is_collection(&self) -> bool {
        matches!(self, Self::List(_) | Self::Set(_) | Self::Map(_))
    }

    /// The type of the elements of a collection.
    pub(crate) fn element(&self) -> Option<&Type> {
        match self {
            Self::List(of) | Self::Set(of) | Self::Map(of) => Some(of),
            _ => None,
        }
    }

    pub(crate) fn has_dynamic(&self) -> bool {
        match self {
            Self::Dynamic => true,
            Self::Bool | Self::Number | Self::String => false,
            Self::List(of) | Self::Set(of) | Self::Map(of) => of.has_dynamic(),
            Self::Tuple(of) => of.iter().any(Self::has_dynamic),
            Self::Object(fields) => fields.values().any(|f| f.ty.has_dynamic()),
        }
    }

    /// As messages name it where a value of any type would do.
    pub(crate) fn constraint(&self) -> String {
        match self {
            Self::Dynamic => "any type".into(),
            Self::List(of) => format!("list of {}", of.constraint()),
            Self::Set(of) => format!("set of {}", of.constraint()),
            Self::Map(of) => format!("map of {}", of.constraint()),
            _ => self.to_string(),
        }
    }
}

/// As messages name it.
impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dynamic => f.write_str("dynamic"),
            Self::Bool => f.write_str("bool"),
            Self::Number => f.write_str("number"),
            Self::String => f.write_str("string"),
            Self::List(of) => write!(f, "list of {of}"),
            Self::Set(of) => write!(f, "set of {of}"),
            Self::Map(of) => write!(f, "map of {of}"),
            Self::Tuple(_) => f.write_str("tuple"),
            Self::Object(_) => f.write_str("object"),
        }
    }
}

/// Elements, and how deep collections are nested in them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Nested<T> {
    elements: T,
    depth: usize,
}

pub(crate) type Items = Arc<Nested<Vec<Value>>>;
pub(crate) type Fields = Arc<Nested<BTreeMap<String, Value>>>;

impl<T> std::ops::Deref for Nested<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.elements
    }
}

fn items(elements: Vec<Value>) -> Items {
    let depth = 1 + elements.iter().map(Value::depth).max().unwrap_or(0);
    Arc::new(Nested { elements, depth })
}

fn fields(elements: BTreeMap<String, Value>) -> Fields {
    let depth = 1 + elements.values().map(Value::depth).max().unwrap_or(0);
    Arc::new(Nested { elements, depth })
}

/// What an expression comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Null(Type),
    Bool(bool),
    Number(Number),
    String(Arc<str>),
    List(Arc<Type>, Items),
    /// In order, each once.
    Set(Arc<Type>, Items),
    Map(Arc<Type>, Fields),
    Tuple(Items),
    Object(Fields),
}

impl Value {
    pub(crate) const NULL: Self = Self::Null(Type::Dynamic);

    pub(crate) fn string(text: impl Into<Arc<str>>) -> Self {
        Self::String(text.into())
    }

    /// A list of `elements`, which are of type `of`.
    pub(crate) fn list(of: Type, elements: Vec<Value>) -> Self {
        Self::list_of(Arc::new(of), elements)
    }

    /// The same, where the type is there to be shared.
    pub(crate) fn list_of(of: Arc<Type>, elements: Vec<Value>) -> Self {
        Self::List(of, items(elements))
    }

    pub(crate) fn strings<S: Into<Arc<str>>>(texts: impl IntoIterator<Item = S>) -> Self {
        Self::list(Type::String, texts.into_iter().map(Self::string).collect())
    }

    /// A set of `elements`, which are of type `of`; those that are there twice count once.
    pub(crate) fn set(of: Type, mut elements: Vec<Value>) -> Self {
        elements.sort_by(Self::order);
        elements.dedup();
        Self::Set(Arc::new(of), items(elements))
    }

    /// A map of `elements`, which are of type `of`.
    pub(crate) fn map(of: Type, elements: BTreeMap<String, Value>) -> Self {
        Self::Map(Arc::new(of), fields(elements))
    }

    pub(crate) fn tuple(elements: Vec<Value>) -> Self {
        Self::Tuple(items(elements))
    }

    pub(crate) fn object(elements: BTreeMap<String, Value>) -> Self {
        Self::Object(fields(elements))
    }

    pub(crate) fn is_null(&self) -> bool {
        matches!(self, Self::Null(_))
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn ty(&self) -> Type {
        match self {
            Self::Null(ty) => ty.clone(),
            Self::Bool(_) => Type::Bool,
            Self::Number(_) => Type::Number,
            Self::String(_) => Type::String,
            Self::List(of, _) => Type::List(of.clone()),
            Self::Set(of, _) => Type::Set(of.clone()),
            Self::Map(of, _) => Type::Map(of.clone()),
            Self::Tuple(items) => Type::Tuple(items.iter().map(Self::ty).collect()),
            Self::Object(fields) => {
                Type::object(fields.iter().map(|(name, v)| (name.clone(), v.ty())))
            }
        }
    }

    /// How deep collections are nested.
    pub(crate) fn depth(&self) -> usize {
        match self {
            Self::Null(_) | Self::Bool(_) | Self::Number(_) | Self::String(_) => 0,
            Self::List(_, items) | Self::Set(_, items) | Self::Tuple(items) => items.depth,
            Self::Map(_, fields) | Self::Object(fields) => fields.depth,
        }
    }

    /// The elements of a list, set or tuple.
    pub(crate) fn sequence(&self) -> Option<&Items> {
        match self {
            Self::List(_, items) | Self::Set(_, items) | Self::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// The elements of a map or object.
    pub(crate) fn mapping(&self) -> Option<&Fields> {
        match self {
            Self::Map(_, fields) | Self::Object(fields) => Some(fields),
            _ => None,
        }
    }

    /// Whether both are the same value; null equals null of every type.
    pub(crate) fn equals(&self, other: &Self) -> bool {
        (self.is_null() && other.is_null()) || self == other
    }

    /// An order of all values, in which sets keep theirs: that of numbers and of texts, and any for
    /// others.
    fn order(&self, other: &Self) -> Ordering {
        let rank = |v: &Self| match v {
            Self::Bool(_) => 0,
            Self::Number(_) => 1,
            Self::String(_) => 2,
            Self::List(..) | Self::Set(..) | Self::Tuple(_) => 3,
            Self::Map(..) | Self::Object(_) => 4,
            Self::Null(_) => 5,
        };
        match (self, other) {
            (Self::Bool(a), Self::Bool(b)) => a.cmp(b),
            (Self::Number(a), Self::Number(b)) => a.cmp(b),
            (Self::String(a), Self::String(b)) => a.cmp(b),
            _ => match (self.sequence(), other.sequence(), self.mapping(), other.mapping()) {
                (Some(a), Some(b), ..) => lexical(a.iter(), b.iter(), |a, b| a.order(b)),
                (.., Some(a), Some(b)) => {
                    lexical(a.iter(), b.iter(), |a, b| a.0.cmp(b.0).then_with(|| a.1.order(b.1)))
                }
                _ => rank(self).cmp(&rank(other)),
            },
        }
    }
}

fn lexical<T>(
    mut a: impl Iterator<Item = T>,
    mut b: impl Iterator<Item = T>,
    order: impl Fn(T, T) -> Ordering,
) -> Ordering {
    loop {
        match (a.next(), b.next()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some(a), Some(b)) => match order(a, b) {
                Ordering::Equal => {}
                unequal => return unequal,
            },
        }
    }
}
