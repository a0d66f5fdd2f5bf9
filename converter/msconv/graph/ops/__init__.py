"""Operations, one file a target.  All offer what `base.Ops` names."""
